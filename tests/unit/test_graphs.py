"""Checks of users' graphs: any that could access the outside, write, or grow too large is
refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from restoration.errors import GraphRefused
from restoration.images import UploadLimits
from restoration.settings import PURE_IMAGE_NODES
from workflows.catalog import load_catalog
from workflows.custom import custom_workflow, graph_of, params_of
from workflows.graph_sizes import check_sizes
from workflows.graphs import GraphRules, check_graph, moves_pixels
from workflows.render import render

MODEL = "realesr-animevideov3-x4.safetensors"
LARGER_MODEL = "x8.safetensors"
RULES = GraphRules(frozenset(PURE_IMAGE_NODES), {MODEL: 4, LARGER_MODEL: 8})
LIMITS = UploadLimits()
Graph = dict[str, Any]
# As ComfyUI's editor saves a workflow.
EDITORS: Graph = {"last_node_id": 9, "nodes": [{"id": 9}], "links": [[1, 9, 0, 4, 0, "IMAGE"]]}


def node(class_type: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def graph(*between: dict[str, Any]) -> Graph:
    """Return LoadImage, these nodes one after the other, and SaveImage; ids are 1, 2, ..."""
    nodes = [node("LoadImage", image="image"), *(deepcopy(each) for each in between)]
    for before, each in enumerate(nodes[1:], 1):
        each["inputs"].setdefault("image", [str(before), 0])
    nodes.append(node("SaveImage", images=[str(len(nodes)), 0], filename_prefix="ComfyUI"))
    return {str(number): each for number, each in enumerate(nodes, 1)}


def scale(by: object) -> dict[str, Any]:
    return node("ImageScaleBy", upscale_method="lanczos", scale_by=by)


PAD = node("ImagePadForOutpaint", left=8, top=8, right=8, bottom=8, feathering=4899)


def refused(found: object, rules: GraphRules = RULES) -> GraphRefused:
    with pytest.raises(GraphRefused) as refusal:
        check_graph(found, rules)
    return refusal.value


class TestWhatIsAccepted:
    @pytest.mark.runs
    def test_a_graph_is_rebuilt_from_what_was_looked_at(self) -> None:
        """Only checked parts are passed on: no titles, no unknown fields."""
        sent = graph(scale(2.0))
        sent["1"] |= {"_meta": {"title": "../../etc"}, "is_changed": "x"}
        sent["1"]["inputs"] |= {"upload": "image"}
        checked = check_graph(sent, RULES)
        assert checked["1"] == node("LoadImage", image="image")
        assert checked["2"] == sent["2"]
        assert checked["3"]["inputs"] == {"images": ["2", 0], "filename_prefix": ""}

    @pytest.mark.runs
    def test_it_runs_as_a_workflow(self) -> None:
        """The graph passes through a row into the prompt, with only the job's own file names."""
        checked = check_graph(graph(scale(2.0)), RULES)
        stored = json.loads(json.dumps(params_of(checked)))
        prompt = render(custom_workflow(graph_of(stored)), stored, "run/input.png", "run/output")
        assert prompt["1"]["inputs"]["image"] == "run/input.png"
        assert prompt["3"]["inputs"] == {"images": ["2", 0], "filename_prefix": "run/output"}
        assert prompt["2"] == checked["2"]

    @pytest.mark.runs
    def test_padding_feathers_nothing_that_nobody_takes(self) -> None:
        """ComfyUI makes that mask pixel by pixel and cannot be stopped meanwhile."""
        assert check_graph(graph(PAD), RULES)["2"]["inputs"]["feathering"] == 0
        rules = GraphRules(RULES.allowed | {"MaskToImage", "InvertMask"}, RULES.models)
        unseen = graph(PAD) | {
            "x": node("InvertMask", mask=["2", 1]),
            "y": node("MaskToImage", mask=["x", 0]),
            "z": node("PreviewImage", images=["y", 0]),
        }
        assert check_graph(unseen, rules)["2"]["inputs"]["feathering"] == 0
        seen = graph(PAD, node("MaskToImage", mask=["2", 1]))
        del seen["3"]["inputs"]["image"]
        assert check_graph(seen, rules)["2"]["inputs"]["feathering"] == 4899

    @pytest.mark.runs
    @pytest.mark.parametrize(
        ("between", "moves"),
        [
            (scale(2.0), False),
            (node("ImageFlip", flip_method="x-axis: vertically"), True),
            (node("ImageScale", width=9, height=9, upscale_method="area", crop="center"), True),
            (node("ImageScale", width=9, height=9, upscale_method="area", crop="disabled"), False),
        ],
    )
    def test_what_moves_pixels_is_known(self, between: dict[str, Any], moves: bool) -> None:
        """So transparency is never applied to the wrong part of the picture."""
        assert moves_pixels(check_graph(graph(between), RULES)) is moves

    @pytest.mark.runs
    def test_models_of_the_catalogue_may_be_named(self) -> None:
        """Other models are refused."""
        sent = graph(node("ImageUpscaleWithModel", upscale_model=["m", 0]))
        sent["m"] = node("UpscaleModelLoader", model_name=MODEL)
        check_graph(sent, RULES)
        for name in ("other.safetensors", "image", "", 7, None, True, ["1", 0], f"sub/{MODEL}"):
            sent["m"] = node("UpscaleModelLoader", model_name=name)
            assert refused(sent).details["node"] == "m"

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda sent: {"prompt": sent},
            lambda sent: {"prompt": sent, "client_id": "c", "extra_data": {"nodes": []}},
            lambda sent: {"prompt": sent, "extra_data": {"extra_pnginfo": {"workflow": EDITORS}}},
            lambda sent: {"input": {"workflow": sent}},
            lambda sent: {"input": {"workflow": sent, "images": []}, "webhook": "x"},
            lambda sent: {"input": {"prompt": sent}},
            lambda sent: {"workflow": sent},
            lambda sent: {"output": sent, "workflow": EDITORS},
            lambda sent: {"workflow": EDITORS, "output": sent},
            lambda sent: {"graph": sent},
        ],
    )
    def test_a_graph_is_taken_out_of_what_tools_wrap_it_in(
        self, wrap: Callable[[Graph], Graph]
    ) -> None:
        """These are the bodies of POST /prompt and hosted ComfyUIs, and graphToPrompt's result."""
        assert check_graph(wrap(graph(scale(2))), RULES) == check_graph(graph(scale(2)), RULES)

    def test_a_node_may_have_the_id_of_a_wrapper(self) -> None:
        sent = graph(scale(2))
        sent["prompt"] = sent.pop("2")
        sent["3"]["inputs"]["images"] = ["prompt", 0]
        assert "prompt" in check_graph(sent, RULES)

    @pytest.mark.parametrize(
        "preview",
        [
            node("PreviewImage", images=["2", 0]),
            node("PreviewImage", images=["nowhere", 0], note="/etc/passwd"),
            node("PreviewAny", source=["2", 0]),
            node("MaskPreview", mask=["1", 1]),
            {"class_type": "PreviewImage"},
        ],
        ids=str,
    )
    def test_previews_beside_the_result_are_left_out(self, preview: dict[str, Any]) -> None:
        sent = graph(scale(2))
        assert check_graph(sent | {"p": preview}, RULES) == check_graph(sent, RULES)

    def test_nodes_that_lead_to_no_result_are_left_out(self) -> None:
        """ComfyUI leaves them out too, so they do not count towards sizes."""
        sent = graph(scale(2)) | {"x": node("ImageScaleBy", image=["1", 0], scale_by=1e6)}
        checked = check_graph(sent, RULES)
        assert checked == check_graph(graph(scale(2)), RULES)
        assert check_sizes(checked, RULES, 100, 50, LIMITS) == (200, 100)

    @pytest.mark.parametrize(
        ("value", "kept"),
        [
            (0, 0),
            (2**64 - 1, 2**64 - 1),
            (2**53 + 1, 2**53 + 1),
            (-(2**63), -(2**63)),
            (7.0, 7),
            (7.9, 7),
            (-7.9, -7),
            (1e19, 10**19),
        ],
    )
    def test_a_seed_arrives_to_the_last_digit(self, value: float, kept: int) -> None:
        """The seed passes through the row into the prompt; a fraction is cut off, as in ComfyUI."""
        rules = GraphRules(RULES.allowed | {"ImageAddNoise"}, RULES.models)
        sent = graph(node("ImageAddNoise", seed=value, strength=1))
        stored = json.loads(json.dumps(params_of(check_graph(sent, rules))))
        prompt = render(custom_workflow(graph_of(stored)), stored, "run/input.png", "run/output")
        seed = json.loads(json.dumps(prompt))["2"]["inputs"]["seed"]
        assert (seed, type(seed)) == (kept, int)

    def test_what_the_editor_adds_to_a_loader_is_left_out(self) -> None:
        sent = graph()
        sent["1"]["inputs"] |= {"upload": "image", "choose file to upload": "image"}
        assert check_graph(sent, RULES)["1"] == node("LoadImage", image="image")

    @pytest.mark.runs
    @pytest.mark.parametrize("workflow", ["restore", "enlarge"])
    def test_our_own_workflows_would_pass(self, workflow: str) -> None:
        """The service's own graphs follow the rules for users."""
        catalog = load_catalog()
        rules = GraphRules(
            RULES.allowed, {model.name: model.scale or 0 for model in catalog.models()}
        )
        sent: Graph = deepcopy(dict(catalog.find(workflow).graph))
        sent["photo"]["inputs"]["image"] = "image"
        assert check_sizes(check_graph(sent, rules), rules, 100, 50, LIMITS) == (400, 200)


class TestWhatIsRefused:
    @pytest.mark.runs
    @pytest.mark.parametrize(
        "class_type",
        [
            *("LoadImageOutput", "LoadLatent", "SaveLatent", "SaveAnimatedPNG"),
            *("SaveSVGNode", "CheckpointLoader", "DiffusersLoader", "EmptyImage", "ImageBatch"),
            *("ExecPython", "HTTPRequest", "loadimage", "", "LoadImage ", "__class__"),
        ],
    )
    def test_other_classes(self, class_type: str) -> None:
        """Only listed classes are allowed, compared exactly; the refusal names the node."""
        error = refused(graph(node(class_type)))
        assert (error.code, error.details["node"]) == ("graph_refused", "2")
        assert "class_type" in error.message

    @pytest.mark.parametrize(
        "sent",
        [
            EDITORS,
            {"nodes": [], "links": [], "definitions": {"subgraphs": []}},
            {"workflow": EDITORS},
            {"prompt": EDITORS},
            {"input": {"workflow": EDITORS}},
        ],
    )
    def test_what_the_editor_saves_is_told_how_to_export(self, sent: Graph) -> None:
        assert "Export (API)" in refused(sent).message

    @pytest.mark.parametrize(
        "sent",
        [
            {"prompt": {}},
            {"prompt": "{}"},
            {"prompt": {"prompt": {"prompt": {"prompt": {"prompt": {"prompt": {}}}}}}},
            {"input": {"workflow": []}},
            {"prompt": {"1": {"inputs": {}}}},
        ],
        ids=str,
    )
    def test_a_wrapper_without_a_graph(self, sent: Graph) -> None:
        refused(sent)

    @pytest.mark.parametrize(
        ("class_type", "name", "value"),
        [
            ("ImageInvert", "x", ["pad", 1]),
            ("ImageInvert", "x", 1),
            ("ImageInvert", "mask", ["pad", 1]),
            ("ImageInvert", "Image", ["pad", 0]),
            ("ImageInvert", "image ", ["pad", 0]),
            ("ImageInvert", "_meta", "title"),
            ("ImageInvert", "unique_id", "1"),
            ("ImageInvert", "prompt", ["pad", 1]),
            ("ImageScaleBy", "crop", "disabled"),
            ("LoadImage", "mask", ["pad", 1]),
            ("LoadImage", "x", 1),
            ("SaveImage", "image", ["pad", 1]),
            ("SaveImage", "extra_pnginfo", ["pad", 1]),
            ("ImagePadForOutpaint", "mask", ["pad", 1]),
        ],
    )
    def test_an_input_that_the_class_does_not_have(
        self, class_type: str, name: str, value: object
    ) -> None:
        """ComfyUI ignores it, but runs the nodes linked to it. The refusal names the node, the
        input, and the class's inputs."""
        sent = graph(node("ImageInvert"), scale(2))
        sent["pad"] = {**PAD, "inputs": {**PAD["inputs"], "image": ["1", 0]}}
        at = next(key for key, each in sent.items() if each["class_type"] == class_type)
        sent[at]["inputs"][name] = value
        error = refused(sent)
        assert error.details["node"] == at
        assert f"{class_type} has no input {name}; its inputs are image" in error.message

    @pytest.mark.parametrize(
        ("name", "value", "why"),
        [
            ("image", ["pad", 1], "must be a link to an output of the type IMAGE"),
            ("image", ["pad", 2], "output 2 of node pad, which does not exist"),
            ("image", ["1", 2], "LoadImage has 2"),
            ("image", ["save", 0], "SaveImage has 0"),
            ("image", ["preview", 0], "PreviewImage has 0"),
            ("image", "pad", "must be a link to an output of the type IMAGE"),
            ("image", 1, "must be a link to an output of the type IMAGE"),
            ("sigma", ["pad", 1], "FLOAT"),
            ("sigma", "1.0", "must be a number"),
            ("sigma", True, "must be a number"),
            ("sigma", [["pad", 1]], "must be a string, a number"),
            ("sigma", {"__value__": ["pad", 1]}, "must be a string, a number"),
            ("blur_radius", False, "must be a number"),
            ("blur_radius", 2**64, "2^64 - 1"),
            ("blur_radius", -(2**63) - 1, "2^64 - 1"),
            ("blur_radius", float("inf"), "2^64 - 1"),
        ],
        ids=str,
    )
    def test_a_value_that_the_class_does_not_take(self, name: str, value: object, why: str) -> None:
        sent = graph(node("ImageBlur"))
        sent["pad"] = {**PAD, "inputs": {**PAD["inputs"], "image": ["1", 0]}}
        sent["save"] = sent.pop("3")
        sent["preview"] = node("PreviewImage", images=["1", 0])
        sent["2"]["inputs"][name] = value
        error = refused(sent)
        assert error.details["node"] == "2"
        assert name in error.message
        assert why in error.message

    @pytest.mark.parametrize("value", ["center", ["1", 0], 1, True, ["preview", 0]])
    def test_a_choice_is_no_link_and_no_number(self, value: object) -> None:
        """This shows whether a picture is cropped."""
        crop = node("ImageScale", width=9, height=9, crop=value)
        sent = graph(crop)
        if isinstance(value, str):
            assert moves_pixels(check_graph(sent, RULES))
        else:
            assert "crop" in refused(sent).message

    def test_previews_are_no_result(self) -> None:
        sent = {"1": graph()["1"], "2": node("PreviewImage", images=["1", 0])}
        assert (
            "exactly one SaveImage node; it has 0; preview nodes do not count"
            in refused(sent).message
        )

    @pytest.mark.runs
    @pytest.mark.parametrize("class_type", [None, 1, [], {}, ["LoadImage"]])
    def test_a_class_that_is_no_text(self, class_type: object) -> None:
        """Any type is refused, hashable or not."""
        sent = graph()
        sent["1"]["class_type"] = class_type
        assert refused(sent).details["node"] == "1"

    @pytest.mark.runs
    @pytest.mark.parametrize(
        "text",
        [
            *("/etc/passwd", " /etc/passwd", "~/x", "..", "a/../b", "..\\x", "C:\\x", "c:x"),
            *("\\\\host\\share", "file:///etc", "http://169.254.169.254/", "s3://bucket/x"),
            *("//host/x", "a\0b", "a\x1b[2J", "x" * 1001, "\ud800", "evil.ckpt", "evil.PTH "),
        ],
    )
    @pytest.mark.parametrize("place", ["ImageBlur", "LoadImage", "SaveImage"])
    def test_paths_addresses_and_models(self, place: str, text: str) -> None:
        """They are refused in any input of any node, known to it or not."""
        sent = graph(node("ImageBlur"))
        at = next(key for key, each in sent.items() if each["class_type"] == place)
        sent[at]["inputs"]["filename_prefix" if place == "SaveImage" else "anything"] = text
        assert refused(sent).details["node"] == at

    @pytest.mark.runs
    @pytest.mark.parametrize(
        "name",
        ["example.png", "image [output]", "comfy-restore/0/input.png", 1, None, ["1", 0], {"a": 1}],
    )
    def test_files_of_others(self, name: object) -> None:
        """LoadImage reads only the job's own photo: no file of another run, no output."""
        assert refused(graph() | {"1": node("LoadImage", image=name)}).details["node"] == "1"

    @pytest.mark.runs
    def test_one_way_in_and_one_way_out(self) -> None:
        """There is one photo and one result; a second SaveImage would write beside it."""
        load, save = graph()["1"], graph()["2"]
        assert (
            "exactly one LoadImage node; it has 2"
            in refused({"1": load, "2": save, "x": load}).message
        )
        assert (
            "exactly one SaveImage node; it has 2"
            in refused({"1": load, "2": save, "x": save}).message
        )
        assert "exactly one SaveImage node; it has 0" in refused({"1": load}).message
        unfed = {"1": node("SaveImage", images="none")}
        assert "must be a link" in refused(unfed).message

    @pytest.mark.runs
    @pytest.mark.parametrize(
        "value",
        [
            None,
            {},
            {"__value__": ["1", 0]},
            [],
            ["1"],
            ["1", 0, 0],
            ["1", "0"],
            ["1", True],
            ["1", -1],
            ["1", 16],
            ["1", 0.5],
            [1, 0],
            ["nowhere", 0],
            [["1", 0], 0],
            float("nan"),
            float("inf"),
            -1e300,
            10**400,
        ],
        ids=str,
    )
    def test_values_of_other_kinds(self, value: object) -> None:
        """Nested and infinite values are refused, and a link must lead to a node of the graph."""
        assert refused(graph(node("ImageBlur", sigma=value))).details["node"] == "2"

    @pytest.mark.runs
    @pytest.mark.parametrize("value", [2, 0, "1", True, ["1", 0], 1.5])
    def test_many_pictures_of_one(self, value: object) -> None:
        """Batches and repetitions stay at one, also in classes that an operator adds."""
        rules = GraphRules(RULES.allowed | {"RepeatImageBatch"}, RULES.models)
        assert refused(graph(node("RepeatImageBatch", amount=value)), rules).details["node"] == "2"
        check_graph(graph(node("RepeatImageBatch", amount=1)), rules)

    @pytest.mark.runs
    def test_circles(self) -> None:
        """A node that needs itself, directly or through others, would never run."""
        sent = graph(node("ImageInvert"), node("ImageInvert"))
        sent["2"]["inputs"]["image"] = ["3", 0]
        assert "itself" in refused(sent).message
        assert "itself" in refused(graph(node("ImageInvert", image=["2", 0]))).message

    @pytest.mark.runs
    def test_too_much(self) -> None:
        """Nodes, inputs and names have bounds."""
        check_graph(graph(*[node("ImageInvert")] * 48), RULES)
        assert "50" in refused(graph(*[node("ImageInvert")] * 49)).message
        refused(graph(node("ImageInvert", **{f"i{n}": 1 for n in range(33)})))
        refused(graph(node("ImageInvert", **{"n" * 65: 1})))
        refused(graph() | {"i" * 65: node("ImageInvert")})

    @pytest.mark.runs
    @pytest.mark.parametrize("found", [None, [], {}, "graph", 1, {"1": None}, {"1": []}, {"": {}}])
    def test_what_is_no_graph(self, found: object) -> None:
        """All other JSON values are refused."""
        refused(found)


class TestSizes:
    @pytest.mark.runs
    @pytest.mark.parametrize(
        ("between", "size"),
        [
            ([], (100, 50)),
            ([scale(2.5)], (250, 125)),
            ([scale(2), scale(0.5)], (100, 50)),
            ([node("ImageScale", width=30, height=40)], (30, 40)),
            ([node("ImageRotate", rotation="90 degrees")], (50, 100)),
            ([node("ImageRotate", rotation="180 degrees")], (100, 50)),
            ([node("ImageCrop", width=10, height=4000, x=0, y=0)], (10, 50)),
            ([node("ImagePadForOutpaint", left=1, right=2, top=3, bottom=4)], (103, 57)),
            ([node("ImageScaleToMaxDimension", largest_size=800)], (800, 800)),
            ([node("ImageBlur", blur_radius=3)], (100, 50)),
        ],
        ids=str,
    )
    def test_each_change_is_followed(
        self, between: list[dict[str, Any]], size: tuple[int, int]
    ) -> None:
        """The computed size is never smaller than the engine's result."""
        assert check_sizes(check_graph(graph(*between), RULES), RULES, 100, 50, LIMITS) == size

    @pytest.mark.runs
    @pytest.mark.parametrize(
        "between",
        [
            [scale(8)] * 5,
            [scale(8)] * 5 + [scale(0.001)] * 3,  # small at the end, but not before
            [node("ImageScale", width=100_000, height=100_000)],
            [node("ImageScale", width=10**9, height=1)],
            [node("ImageScaleToTotalPixels", megapixels=1000)],
            [node("ImageScaleToMaxDimension", largest_size=16_000)],
            [node("ImagePadForOutpaint", left=1e6, right=0, top=0, bottom=0)],
            [node("ImageRotate", rotation="90 degrees"), scale(600)],
        ],
        ids=str,
    )
    def test_a_picture_too_large_on_the_way(self, between: list[dict[str, Any]]) -> None:
        """It is refused before anything runs, by the node that would make it."""
        with pytest.raises(GraphRefused, match="pixels"):
            check_sizes(check_graph(graph(*between), RULES), RULES, 1000, 500, LIMITS)

    @pytest.mark.parametrize("consumer", ["MaskToImage", "TheirOwnClass"])
    def test_a_large_picture_is_not_feathered(self, consumer: str) -> None:
        """The mask is made pixel by pixel without an interruption, whichever node takes it."""
        rules = GraphRules(RULES.allowed | {consumer}, RULES.models)
        sent = graph(PAD, node(consumer, mask=["2", 1]))
        del sent["3"]["inputs"]["image"]
        checked = check_graph(sent, rules)
        assert check_sizes(checked, rules, 1024, 1024, LIMITS) == (1040, 1040)
        with pytest.raises(
            GraphRefused, match="node 2: its image of 1025x1024 pixels is too large for feathering"
        ):
            check_sizes(checked, rules, 1025, 1024, LIMITS)

    @pytest.mark.runs
    @pytest.mark.parametrize(("model", "times"), [(MODEL, 4), (LARGER_MODEL, 8)])
    def test_a_model_enlarges_as_its_manifest_says(self, model: str, times: int) -> None:
        """Each model enlarges by its own factor, each time it is applied."""
        once, twice = ([node("ImageUpscaleWithModel", upscale_model=["m", 0])] * n for n in (1, 2))
        loader = {"m": node("UpscaleModelLoader", model_name=model)}
        checked = check_graph(graph(*once) | loader, RULES)
        assert check_sizes(checked, RULES, 100, 50, LIMITS) == (100 * times, 50 * times)
        with pytest.raises(GraphRefused, match="pixels"):
            check_sizes(check_graph(graph(*twice) | loader, RULES), RULES, 4000, 4000, LIMITS)

    @pytest.mark.runs
    @pytest.mark.parametrize("link", [["1", 0], "m", None])
    def test_a_model_from_elsewhere_has_no_known_factor(self, link: object) -> None:
        """Only a loader says which model it is."""
        sent = graph(node("ImageUpscaleWithModel", upscale_model=link or 1))
        with pytest.raises(GraphRefused, match="UpscaleModelLoader"):
            check_sizes(check_graph(sent, RULES), RULES, 10, 10, LIMITS)

    @pytest.mark.runs
    def test_too_many_large_pictures_together(self) -> None:
        """ComfyUI keeps them all until the end: three of the largest pass, fifty do not."""
        large = node("ImageScale", width=10_000, height=10_000)
        few = graph(large, node("ImageInvert"))
        assert check_sizes(check_graph(few, RULES), RULES, 8, 8, LIMITS) == (10_000, 10_000)
        many = graph(large, *[node("ImageInvert")] * 47)
        with pytest.raises(GraphRefused, match="in total"):
            check_sizes(check_graph(many, RULES), RULES, 8, 8, LIMITS)

    @pytest.mark.runs
    @pytest.mark.parametrize("value", ["8", True, ["1", 0], -1, None])
    def test_a_size_that_cannot_be_told(self, value: object) -> None:
        """A text, which ComfyUI would convert, and a link, which could bring any, are refused."""
        sent = graph(scale(value) if value is not None else node("ImageScaleBy"))
        with pytest.raises(GraphRefused, match="scale_by"):
            check_sizes(check_graph(sent, RULES), RULES, 10, 10, LIMITS)

    @pytest.mark.runs
    @pytest.mark.parametrize(("width", "height"), [(0, 1000), (1000, 0), (0, 0)])
    def test_proportions_are_not_taken_for_a_size(self, width: int, height: int) -> None:
        """0 means "as wide as it is high", which depends on the previous nodes."""
        sent = graph(node("ImageScale", width=width, height=height))
        with pytest.raises(GraphRefused, match="greater than 0"):
            check_sizes(check_graph(sent, RULES), RULES, 16_000, 1, LIMITS)

    @pytest.mark.runs
    def test_a_blend_has_the_size_of_its_first_picture(self) -> None:
        """ComfyUI fits the second picture to the first."""
        sent = graph(scale(4))
        sent["b"] = node("ImageBlend", image1=["1", 0], image2=["2", 0])
        sent["3"]["inputs"]["images"] = ["b", 0]
        assert check_sizes(check_graph(sent, RULES), RULES, 100, 50, LIMITS) == (100, 50)


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_json = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=20,
)
_names = st.sampled_from([*"1234", "image", "images", "scale_by", "width", "height", "model_name"])
_values = st.one_of(
    _json,
    st.tuples(st.sampled_from("12345"), st.integers(-1, 3)).map(list),
    st.sampled_from(["image", MODEL, "8", 0, 1, 4, 1e9]),
)
_nodes = st.fixed_dictionaries(
    {
        "class_type": st.sampled_from(PURE_IMAGE_NODES) | _json,
        "inputs": st.dictionaries(_names, _values, max_size=4) | _json,
    }
)
_graphs = st.dictionaries(st.sampled_from("1234"), _nodes | _json, max_size=4)


@pytest.mark.runs
@pytest.mark.minutes(5)
@given(_json | _graphs | _graphs.map(lambda extra: {**graph(scale(2)), **extra}))
@example(graph(scale(2)))
def test_no_graph_raises_anything_else(sent: object) -> None:
    """Any input is refused with a reason, or is a graph that can be rendered."""
    try:
        checked = check_graph(sent, RULES)
        width, height = check_sizes(checked, RULES, 4000, 3000, LIMITS)
    except GraphRefused:
        return
    assert check_graph(checked, RULES) == checked  # the stored graph can be sent again
    assert width * height <= LIMITS.max_result_pixels
    assert {each["class_type"] for each in checked.values()} <= RULES.allowed
    prompt = render(custom_workflow(checked), {}, "run/input.png", "run/output")
    assert "run/input.png" in json.dumps(prompt)
