"""Check users' own graphs, node by node.

`check_graph` accepts any JSON value and returns a graph rebuilt from checked parts only, so that
nothing unchecked reaches an engine. It raises only GraphRefused, which names the node and the
reason. `workflows.graph_inputs` checks a node's inputs, `workflows.graph_sizes` the sizes of the
pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from workflows.graph_inputs import GraphRules, InputChecker, refuse

__all__ = [
    "LOAD",
    "MODEL_LOADER",
    "MODEL_NAME",
    "PAD",
    "PHOTO",
    "SAVE",
    "Graph",
    "GraphRules",
    "Node",
    "check_graph",
    "links",
    "moves_pixels",
    "nodes_of",
    "refuse",
]

Node = Mapping[str, Any]  # {"class_type": ..., "inputs": {name: value or [node id, output]}}
Graph = Mapping[str, Node]

LOAD, SAVE = "LoadImage", "SaveImage"
# The file name that LoadImage must have: the form field that holds the photo.
PHOTO = "image"
MODEL_LOADER, MODEL_NAME = "UpscaleModelLoader", "model_name"
PAD, _PADDING_MASK = "ImagePadForOutpaint", 1  # the index of the mask output
# Classes that move pixels to another place in the picture.
_MOVING = frozenset(
    {
        "CenterCropImages",
        "EmptyImage",
        "FluxKontextImageScale",
        "ImageCompositeMasked",
        "ImageCrop",
        "ImageFlip",
        PAD,
        "ImageRotate",
        "ImageStitch",
        "PorterDuffImageComposite",
        "RandomCropImages",
        "ResizeAndPadImage",
    }
)
# Classes that only show a picture in the editor. They have no outputs and are removed.
_PREVIEWS = frozenset({"PreviewImage", "MaskPreview", "PreviewAny"})

# Keys that wrap the graph: in the body of POST /prompt, in that of hosted ComfyUIs, and in the
# result of the editor's graphToPrompt, whose `workflow` has the editor's own format.
_WRAPPERS = ("prompt", "output", "input", "workflow", "graph")
_MAX_DEPTH = 4

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_NO_GRAPH = "a graph must be a JSON object of 1 to {} nodes by id"


def check_graph(graph: object, rules: GraphRules) -> dict[str, Node]:
    """Return the rebuilt graph in topological order: each node after the nodes that it needs.

    It has exactly one LoadImage and one SaveImage; `render` sets their file names. Nodes that the
    result does not need are removed. Raises GraphRefused.
    """
    found = _unwrapped(graph)
    if not isinstance(found, dict):
        refuse(None, _NO_GRAPH.format(rules.max_nodes))
    sent = {node_id: node for node_id, node in found.items() if not _is_preview(node)}
    if not 0 < len(sent) <= rules.max_nodes:
        refuse(None, _NO_GRAPH.format(rules.max_nodes))
    nodes = {node_id: _checked(node_id, node, found, rules) for node_id, node in sent.items()}
    for only in (LOAD, SAVE):
        if (count := len(nodes_of(nodes, only))) != 1:
            shown = "; preview nodes do not count" if len(sent) < len(found) else ""
            refuse(None, f"the graph must have exactly one {only} node; it has {count}{shown}")
    order = _in_order(nodes)
    needed = _needed(nodes)
    nodes = {node_id: nodes[node_id] for node_id in order if node_id in needed}
    return {node_id: _without_feathering(node_id, nodes) for node_id in nodes}


def _unwrapped(sent: object) -> object:
    """Return the graph in API format from inside its wrappers; other values come back unchecked.

    Raises GraphRefused for the format in which the editor saves.
    """
    found = sent
    for _ in range(_MAX_DEPTH):
        if not isinstance(found, dict) or any(
            isinstance(v, dict) and "class_type" in v for v in found.values()
        ):
            break
        if isinstance(found.get("nodes"), list):
            refuse(
                None,
                "this is a workflow in the format in which ComfyUI's editor saves it; use "
                "Export (API) in the editor and send that file",
            )
        inner = [found[name] for name in _WRAPPERS if isinstance(found.get(name), dict)]
        if not inner:
            break
        found = inner[0]
    return found


def nodes_of(graph: Graph, class_type: str) -> list[str]:
    """Return the ids of the nodes of class `class_type`."""
    return [node_id for node_id, node in graph.items() if node["class_type"] == class_type]


def links(node: Node) -> Iterator[tuple[str, str]]:
    """Yield (input name, source node id) for each link of the node."""
    for name, value in node["inputs"].items():
        if isinstance(value, list):
            yield name, value[0]


def moves_pixels(graph: Graph) -> bool:
    """Return whether a place in the result may show another place of the photo."""
    return any(
        node["class_type"] in _MOVING or node["inputs"].get("crop", "disabled") != "disabled"
        for node in graph.values()
    )


def _is_preview(node: object) -> bool:
    class_type = node.get("class_type") if isinstance(node, dict) else None
    return isinstance(class_type, str) and class_type in _PREVIEWS


def _checked(node_id: object, node: object, graph: Mapping[str, object], rules: GraphRules) -> Node:
    if not isinstance(node_id, str) or not _ID.fullmatch(node_id):
        refuse(
            None,
            "the id of a node must have 1 to 64 letters, digits, dots, colons, hyphens or "
            "underscores",
        )
    if not isinstance(node, dict):
        refuse(node_id, "a node must be an object with class_type and inputs")
    class_type, inputs = node.get("class_type"), node.get("inputs")
    if not isinstance(class_type, str) or class_type not in rules.allowed:
        allowed = ", ".join(sorted(rules.allowed))
        refuse(node_id, f"its class_type is not permitted; choose from {allowed}")
    if not isinstance(inputs, dict) or len(inputs) > rules.max_inputs:
        refuse(node_id, f"inputs must be an object of at most {rules.max_inputs} values by name")
    checked = InputChecker(node_id, class_type, graph, rules).check(inputs)
    if class_type == LOAD:
        if checked.get("image") != PHOTO:
            refuse(
                node_id,
                f"the input image must be {PHOTO!r}, the name of the form field with the photo",
            )
        checked = {"image": PHOTO}
    if class_type == SAVE:
        if not isinstance(checked.get("images"), list):
            refuse(node_id, "the input images must be a link")
        checked = {"images": checked["images"], "filename_prefix": ""}
    if class_type == MODEL_LOADER and checked.get(MODEL_NAME) not in rules.models:
        refuse(
            node_id,
            f"the input {MODEL_NAME} names a model that is not installed; choose from "
            f"{rules.models_listed}",
        )
    return {"class_type": class_type, "inputs": checked}


def _without_feathering(node_id: str, nodes: Graph) -> Node:
    """Return the node, with feathering set to 0 if no node uses the mask that it makes.

    ComfyUI computes the feathering pixel by pixel, for minutes without a chance to interrupt it.
    """
    node = nodes[node_id]
    mask = [node_id, _PADDING_MASK]
    if node["class_type"] != PAD or any(mask in n["inputs"].values() for n in nodes.values()):
        return node
    return {**node, "inputs": {**node["inputs"], "feathering": 0}}


def _needed(nodes: Graph) -> set[str]:
    """Return the ids of the nodes that the result depends on, and of the LoadImage node.

    ComfyUI runs only the nodes that an output depends on.
    """
    needed: set[str] = set()
    waiting = [*nodes_of(nodes, SAVE), *nodes_of(nodes, LOAD)]
    while waiting:
        node_id = waiting.pop()
        if node_id not in needed:
            needed.add(node_id)
            waiting += [source for _, source in links(nodes[node_id])]
    return needed


def _in_order(nodes: Graph) -> list[str]:
    """Return the ids in topological order.

    Kahn's algorithm, since a recursive search could exceed the recursion limit on a deep graph.
    """
    needs = {node_id: {source for _, source in links(node)} for node_id, node in nodes.items()}
    order: list[str] = []
    while ready := [node_id for node_id, sources in needs.items() if not sources.difference(order)]:
        order += ready
        for node_id in ready:
            del needs[node_id]
    if needs:
        refuse(min(needs), "the node depends on itself")
    return order
