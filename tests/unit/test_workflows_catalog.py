"""The catalogue refuses every workflow that could not run, and names the fault."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from restoration.errors import InvalidSettings, ModelMissing, UnknownWorkflow, WorkflowInvalid
from restoration.jobs import OutputFormat
from workflows.catalog import BUILT_IN, load_catalog, load_workflow
from workflows.manifest import ModelSpec

MODEL = "realesrgan-x4plus.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the `restore` workflow, for tests to break."""
    return Path(shutil.copytree(BUILT_IN / "restore", tmp_path / "restore"))


def edit_graph(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "graph.json"
    graph = json.loads(path.read_text())
    change(graph)
    path.write_text(json.dumps(graph))


def edit_manifest(folder: Path, old: str, new: str) -> None:
    path = folder / "manifest.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def refusal(folder: Path) -> str:
    with pytest.raises(WorkflowInvalid) as caught:
        load_workflow(folder)
    assert caught.value.details["workflow"] == "restore"
    assert "\n" not in caught.value.message
    return caught.value.message


def test_the_built_in_workflows_load() -> None:
    """Both built-in workflows are sound, and offer every format with PNG as the default."""
    catalog = load_catalog()
    assert [workflow.name for workflow in catalog] == ["enlarge", "restore"]
    for workflow in catalog:
        assert workflow.manifest.output.formats == tuple(OutputFormat)
        assert workflow.manifest.output.default_format is OutputFormat.PNG


def test_an_unknown_name_says_what_there_is() -> None:
    """The error for an unknown workflow lists the known ones."""
    with pytest.raises(UnknownWorkflow, match="choose from enlarge, restore"):
        load_catalog().find("colourise")


def test_a_missing_node_class_is_named(folder: Path) -> None:
    """A graph without a node that its manifest names is refused."""
    edit_graph(folder, lambda graph: graph.pop("blended"))
    assert "node class ImageBlend, which the graph does not use" in refusal(folder)


@pytest.mark.parametrize("value", [[], [[1, 2], 3], ["photo"], ["photo", "0"]])
def test_a_list_that_is_no_link_is_named(folder: Path, value: list[object]) -> None:
    """ComfyUI treats every list as a link: one that is not is refused before it is tried."""
    edit_graph(folder, lambda graph: graph["blended"]["inputs"].update(image1=value))
    assert "input 'image1' of node 'blended' is a list" in refusal(folder)


def test_the_enlargement_is_a_number(folder: Path) -> None:
    """It limits results: a parameter that is missing or not a number is refused."""
    assert load_workflow(folder).manifest.enlargement({"scale": 3}) == 3
    edit_manifest(folder, 'enlarges = "scale"', "enlarges = 3.99")
    assert load_workflow(folder).manifest.enlargement({"scale": 2}) == 3.99
    edit_manifest(folder, "enlarges = 3.99", 'enlarges = "size"')
    assert "enlarges names size, which is not a number" in refusal(folder)


def test_a_missing_bound_node_is_named(folder: Path) -> None:
    """A binding to a node id that the graph lacks is refused."""
    edit_manifest(folder, 'node = "blended"', 'node = "mixed"')
    assert "the node 'mixed', which is not in the graph" in refusal(folder)


def test_a_missing_bound_input_is_named(folder: Path) -> None:
    """A binding to an input that its node lacks is refused."""
    edit_manifest(folder, 'input = "blend_factor"', 'input = "amount"')
    assert "the input 'amount', which node 'blended' does not have" in refusal(folder)


def test_a_binding_never_cuts_a_link(folder: Path) -> None:
    """A binding to an input that another node feeds is refused."""
    edit_manifest(folder, 'input = "blend_factor"', 'input = "image1"')
    assert "'image1' of node 'blended' is a link" in refusal(folder)


def test_a_class_the_manifest_does_not_name_is_refused(folder: Path) -> None:
    """Otherwise an engine that lacks a class would be noticed too late."""
    edit_manifest(folder, '  "ImageBlend",\n', "")
    assert "ImageBlend, which the manifest does not list" in refusal(folder)


def test_a_dangling_link_is_refused(folder: Path) -> None:
    """Every link in the graph leads to a node of the graph."""
    edit_graph(folder, lambda graph: graph["restored"]["inputs"].update(image=["scan", 0]))
    assert "'image' of node 'restored' links to the missing node 'scan'" in refusal(folder)


def test_a_model_of_the_graph_must_be_declared(folder: Path) -> None:
    """A model that only the graph names would be found missing while the prompt runs."""
    edit_graph(folder, lambda graph: graph["model"]["inputs"].update(model_name="a.safetensors"))
    assert "the model a.safetensors is named by its graph only" in refusal(folder)


def test_a_declared_model_must_be_used(folder: Path) -> None:
    """A model that only the manifest names would be fetched and checked for nothing."""
    edit_graph(folder, lambda graph: graph["model"]["inputs"].update(model_name="none"))
    assert f"the model {MODEL} is named by its manifest only" in refusal(folder)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("default = 4\n", "default = 5\n", "scale"),
        ("default = 0.75", 'default = "much"', "parameters.1.float.default"),
        ('name = "quality"', 'name = "sharpness"', "sharpness needs a binding"),
        ('default_format = "png"', 'default_format = "gif"', "default_format"),
        ('formats = ["png", "jpeg", "webp"]', 'formats = ["jpeg"]', "not in formats"),
        ("max_attempts = 3", "max_attempts = 0", "max_attempts"),
        ('folder = "upscale_models"', 'folder = "../elsewhere"', "folder"),
        ('name = "scale"', 'name = "strength"', "same name"),
        ('title = "', 'subtitle = "', "subtitle"),
        ('version = "1"', "version = ", "Invalid value"),
        ('name = "restore"', 'name = "repair"', "has the name 'repair'"),
    ],
)
def test_a_wrong_manifest_is_refused(folder: Path, old: str, new: str, problem: str) -> None:
    """A fault in a manifest is named in one line."""
    edit_manifest(folder, old, new)
    assert problem in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"nodes": [], "links": []}'])
def test_a_wrong_graph_is_refused(folder: Path, text: str) -> None:
    """Only a graph in ComfyUI's API format is accepted, not the one that its editor saves."""
    (folder / "graph.json").write_text(text)
    refusal(folder)


def test_a_missing_graph_is_refused(folder: Path) -> None:
    """A folder with a manifest but no graph is refused."""
    (folder / "graph.json").unlink()
    assert "graph.json" in refusal(folder)


def test_an_engine_that_lacks_a_node_is_refused() -> None:
    """The refusal names the workflow and each class that the engine lacks."""
    catalog = load_catalog()
    classes = catalog.find("restore").manifest.nodes
    catalog.check_nodes(classes | {"KSampler"})
    with pytest.raises(
        WorkflowInvalid, match=r"workflow enlarge .* lacks the node classes ImageBlend, SaveImage"
    ):
        catalog.check_nodes(classes - {"ImageBlend", "SaveImage"})


def write_models(models: list[ModelSpec], folder: Path, content: bytes) -> None:
    for model in models:
        path = folder / model.folder / model.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    """The refusal names the workflow and the missing file."""
    with pytest.raises(ModelMissing, match=r"workflow enlarge .*animevideov3.* is missing"):
        load_catalog().check_models(tmp_path)


def test_a_model_with_other_bytes_is_refused(tmp_path: Path) -> None:
    """The refusal names both the actual and the expected sha256."""
    catalog = load_catalog()
    write_models(catalog.models(), tmp_path, b"not a model")
    with pytest.raises(ModelMissing) as caught:
        catalog.check_models(tmp_path)
    assert hashlib.sha256(b"not a model").hexdigest() in caught.value.message
    assert catalog.models()[0].sha256 in caught.value.message


def test_models_with_the_right_bytes_pass(folder: Path, tmp_path: Path) -> None:
    """A model is accepted by its sha256 alone."""
    sha256 = load_workflow(folder).manifest.models[0].sha256
    edit_manifest(folder, sha256, hashlib.sha256(b"weights").hexdigest())
    catalog = load_catalog(folder.parent)
    write_models(catalog.models(), tmp_path, b"weights")
    catalog.check_models(tmp_path)


def test_a_folder_of_ones_own_is_offered_too(tmp_path: Path) -> None:
    """It is offered beside the built-in workflows, whose names it may not use."""
    shutil.copytree(BUILT_IN / "enlarge", tmp_path / "enlarge")
    with pytest.raises(WorkflowInvalid, match="name of another workflow"):
        load_catalog(more=tmp_path)
    (tmp_path / "enlarge").rename(tmp_path / "mine")
    manifest = tmp_path / "mine" / "manifest.toml"
    manifest.write_text(manifest.read_text().replace('name = "enlarge"', 'name = "mine"', 1))
    catalog = load_catalog(more=tmp_path)
    assert {*load_catalog().workflows, "mine"} == set(catalog.workflows)


def test_a_folder_that_is_not_there_is_no_empty_one(tmp_path: Path) -> None:
    """A typo in WORKFLOWS_DIR must not silently remove every workflow."""
    with pytest.raises(InvalidSettings, match="WORKFLOWS_DIR"):
        load_catalog(more=tmp_path / "worklfows")


def test_the_name_of_users_graphs_is_taken(tmp_path: Path) -> None:
    """A worker would look for a graph in the job's parameters."""
    mine = shutil.copytree(BUILT_IN / "enlarge", tmp_path / "custom")
    edit_manifest(mine, 'name = "enlarge"', 'name = "custom"')
    with pytest.raises(WorkflowInvalid, match="users' own graphs"):
        load_catalog(more=tmp_path)


def _with_older(tmp_path: Path, version: str, folder: str) -> Path:
    """Return a folder of workflows whose `restore` is of version 2, and was `version` before."""
    newest = Path(shutil.copytree(BUILT_IN / "restore", tmp_path / "restore"))
    older = Path(shutil.copytree(newest, newest / "older" / folder))
    edit_manifest(newest, 'version = "1"', 'version = "2"')
    edit_manifest(older, 'version = "1"', f'version = "{version}"')
    return tmp_path


@pytest.mark.versions
def test_older_versions_are_kept_beside_the_newest(tmp_path: Path) -> None:
    """The newest is offered; an older one serves jobs that were submitted with it."""
    catalog = load_catalog(_with_older(tmp_path, "1", "1"))
    assert [(each.name, each.version) for each in catalog] == [("restore", "2")]
    assert catalog.find("restore").version == "2"
    assert catalog.version("restore", "1").version == "1"
    assert {each.version for each in catalog.versions()} == {"1", "2"}
    with pytest.raises(UnknownWorkflow, match="the workflow restore has no version 3"):
        catalog.version("restore", "3")


@pytest.mark.versions
@pytest.mark.parametrize(
    ("version", "folder", "problem"),
    [("1", "0", "contains version '1'"), ("2", "2", "has the same version as the newest")],
)
def test_an_older_version_that_contradicts_its_folder_is_refused(
    tmp_path: Path, version: str, folder: str, problem: str
) -> None:
    """A forgotten number would let jobs run another graph than they were submitted with."""
    with pytest.raises(WorkflowInvalid, match=problem):
        load_catalog(_with_older(tmp_path, version, folder))
