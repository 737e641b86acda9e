"""Rendering puts each value where its manifest says, and leaves the template unchanged."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restoration.engine_port import Prompt
from restoration.jobs import ParamValue
from workflows.catalog import Workflow, load_catalog
from workflows.render import render

CATALOG = load_catalog()
RESTORE = CATALOG.find("restore")


def rendered(workflow: Workflow = RESTORE, **params: ParamValue) -> Prompt:
    return render(workflow, workflow.resolve(params), "job/photo.png", "job/result")


def differences(template: Prompt, prompt: Prompt) -> dict[str, Any]:
    """Return `node.input` → value, for each input that differs."""
    return {
        f"{node_id}.{name}": value
        for node_id, node in prompt.items()
        for name, value in node["inputs"].items()
        if value != template[node_id]["inputs"][name]
    }


def test_values_reach_their_nodes_and_no_others() -> None:
    """The picture, the prefix, the scale (twice) and the strength change; all else stays."""
    assert differences(RESTORE.graph, rendered(scale=2, strength=0.25)) == {
        "photo.image": "job/photo.png",
        "result.filename_prefix": "job/result",
        "photo_scaled.scale_by": 2,
        "restored_scaled.scale_by": 0.5,
        "blended.blend_factor": 0.25,
    }


@pytest.mark.parametrize("workflow", list(CATALOG), ids=lambda workflow: workflow.name)
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_both_branches_have_one_size(workflow: Workflow, scale: int) -> None:
    """The model enlarges four times: its branch is scaled to match the photo's."""
    graph = rendered(workflow, scale=scale)
    by_hand, by_model = (
        graph[graph["blended"]["inputs"][image][0]]["inputs"]["scale_by"]
        for image in ("image1", "image2")
    )
    assert by_hand == scale
    assert by_model * 4 == scale


def test_the_encoder_parameter_does_not_reach_the_graph() -> None:
    """Quality is for the encoder after the engine: the prompt is the same for any quality."""
    assert rendered(quality=5) == rendered(quality=95)


@given(scale=st.integers(1, 4), strength=st.floats(0, 1))
def test_the_template_is_never_changed(scale: int, strength: float) -> None:
    """Changes to a rendered prompt leave the template as it was loaded."""
    before = copy.deepcopy(dict(RESTORE.graph))
    prompt = rendered(scale=scale, strength=strength)
    for node in prompt.values():
        node["inputs"].clear()
    assert RESTORE.graph == before


def test_a_prompt_is_plain_json() -> None:
    """The prompt survives JSON unchanged, so ComfyUI gets exactly the rendered prompt."""
    prompt = rendered()
    assert json.loads(json.dumps(prompt)) == prompt
