"""Render a workflow with its parameters to a prompt for ComfyUI."""

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
    """Return the graph for POST /prompt. The workflow's template is not changed.

    `params` must come from `workflow.resolve`. `image_name` is the picture's name in the engine's
    input folder; `output_prefix` is the prefix of the saved file's name.
    """
    manifest = workflow.manifest
    graph: dict[str, Any] = deepcopy(dict(workflow.graph))
    _put(graph, manifest.image, image_name)
    _put(graph, manifest.output, output_prefix)
    for parameter in manifest.parameters:
        value = params[parameter.name]
        for binding in parameter.bindings:
            # a factor of 1.0 keeps integers integers; a text cannot have another factor
            if binding.factor == 1.0 or isinstance(value, str):
                _put(graph, binding, value)
            else:
                _put(graph, binding, value * binding.factor)
    return graph


def _put(graph: dict[str, Any], target: Target, value: ParamValue) -> None:
    graph[target.node]["inputs"][target.input] = value
