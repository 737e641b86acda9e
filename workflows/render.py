"""From a workflow and its resolved parameters to the prompt that ComfyUI runs. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from restoration.engine_port import Prompt
from restoration.jobs import ParamValue
from workflows.catalog import Workflow
from workflows.manifest import Target


def render(
    workflow: Workflow, params: Mapping[str, ParamValue], image_name: str, output_prefix: str
) -> Prompt:
    """The graph for POST /prompt; the template stays as it is.

    `params` are those that `workflow.resolve` returned. `image_name` is the picture's name in
    the engine's input folder, `output_prefix` begins the name of the file that it saves.
    """
    manifest = workflow.manifest
    graph: dict[str, Any] = deepcopy(dict(workflow.graph))
    _put(graph, manifest.image, image_name)
    _put(graph, manifest.output, output_prefix)
    for parameter in manifest.parameters:
        for binding in parameter.bindings:
            _put(graph, binding, _scaled(params[parameter.name], binding.factor))
    return graph


def _put(graph: dict[str, Any], target: Target, value: ParamValue) -> None:
    graph[target.node]["inputs"][target.input] = value


def _scaled(value: ParamValue, factor: float) -> ParamValue:
    """Whole numbers stay whole unless a factor asks for more; a flag or a text has none."""
    if factor == 1.0 or isinstance(value, str):
        return value
    return value * factor
