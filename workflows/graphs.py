"""What a user's own graph may contain, node by node. Pure.

`check_graph` takes anything that JSON can hold, and gives back a graph rebuilt from the parts that
were looked at: nothing else of what was sent reaches an engine. Its only exception is GraphRefused,
which names the node and says why. How large pictures become in it is in `workflows.graph_sizes`,
which inputs a node may have in `workflows.graph_inputs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from workflows.graph_exports import graph_of_export
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
# What LoadImage names as its file: the form's field that holds the photo.
PHOTO = "image"
MODEL_LOADER, MODEL_NAME = "UpscaleModelLoader", "model_name"
PAD, _PADDING_MASK = "ImagePadForOutpaint", 1  # the output that is the mask
# Their pixels come out elsewhere than they came in.
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
# They show a picture in the editor and have no outputs: a graph gives the same without them.
_PREVIEWS = frozenset({"PreviewImage", "MaskPreview", "PreviewAny"})

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_NO_GRAPH = "a graph is a JSON object of 1 to {} nodes by their ids"


def check_graph(graph: object, rules: GraphRules) -> dict[str, Node]:
    """The graph, rebuilt, in an order in which every node comes after those that it needs.

    It has one LoadImage and one SaveImage, whose file names are left to whoever runs it. Raises
    GraphRefused.
    """
    found = graph_of_export(graph)
    if not isinstance(found, dict):
        refuse(None, _NO_GRAPH.format(rules.max_nodes))
    sent = {node_id: node for node_id, node in found.items() if not _is_preview(node)}
    if not 0 < len(sent) <= rules.max_nodes:
        refuse(None, _NO_GRAPH.format(rules.max_nodes))
    nodes = {node_id: _checked(node_id, node, found, rules) for node_id, node in sent.items()}
    for only in (LOAD, SAVE):
        if (count := len(nodes_of(nodes, only))) != 1:
            shown = "; what is only previewed is not kept" if len(sent) < len(found) else ""
            refuse(None, f"the graph must have one {only} node; it has {count}{shown}")
    order = _in_order(nodes)
    needed = _needed(nodes)
    nodes = {node_id: nodes[node_id] for node_id in order if node_id in needed}
    return {node_id: _without_feathering(node_id, nodes) for node_id in nodes}


def nodes_of(graph: Graph, class_type: str) -> list[str]:
    """The ids of the nodes of that class."""
    return [node_id for node_id, node in graph.items() if node["class_type"] == class_type]


def links(node: Node) -> Iterator[tuple[str, str]]:
    """(input, id of the node that it comes from) of each link."""
    for name, value in node["inputs"].items():
        if isinstance(value, list):
            yield name, value[0]


def moves_pixels(graph: Graph) -> bool:
    """Whether a part of the result may show another part of the photo than the same place."""
    return any(
        node["class_type"] in _MOVING or node["inputs"].get("crop", "disabled") != "disabled"
        for node in graph.values()
    )


def _is_preview(node: object) -> bool:
    class_type = node.get("class_type") if isinstance(node, dict) else None
    return isinstance(class_type, str) and class_type in _PREVIEWS


def _checked(node_id: object, node: object, graph: Mapping[str, object], rules: GraphRules) -> Node:
    if not isinstance(node_id, str) or not _ID.fullmatch(node_id):
        refuse(None, "a node's id has 1 to 64 letters, digits, dots, colons, hyphens, underscores")
    if not isinstance(node, dict):
        refuse(node_id, "a node is an object with class_type and inputs")
    class_type, inputs = node.get("class_type"), node.get("inputs")
    if not isinstance(class_type, str) or class_type not in rules.allowed:
        allowed = ", ".join(sorted(rules.allowed))
        refuse(node_id, f"its class_type is not among those that may be used: {allowed}")
    if not isinstance(inputs, dict) or len(inputs) > rules.max_inputs:
        refuse(node_id, f"inputs is an object of at most {rules.max_inputs} values by their names")
    checked = InputChecker(node_id, class_type, graph, rules).check(inputs)
    _check_class(node_id, class_type, checked, rules)
    if class_type == LOAD:
        checked = {"image": PHOTO}
    if class_type == SAVE:
        checked = {"images": checked["images"], "filename_prefix": ""}
    return {"class_type": class_type, "inputs": checked}


def _without_feathering(node_id: str, nodes: Graph) -> Node:
    """The node; without feathering where that makes a mask that no node asks for: ComfyUI makes
    it pixel by pixel, for minutes in which nothing can interrupt it."""
    node = nodes[node_id]
    mask = [node_id, _PADDING_MASK]
    if node["class_type"] != PAD or any(mask in n["inputs"].values() for n in nodes.values()):
        return node
    return {**node, "inputs": {**node["inputs"], "feathering": 0}}


def _check_class(
    node_id: str, class_type: str, inputs: Mapping[str, object], rules: GraphRules
) -> None:
    """What the classes that touch files must have; those values are replaced afterwards."""
    if class_type == LOAD and inputs.get("image") != PHOTO:
        refuse(node_id, f"its input image must be {PHOTO!r}, the form's field with the photo")
    if class_type == SAVE and not isinstance(inputs.get("images"), list):
        refuse(node_id, "its input images must be a link")
    if class_type == MODEL_LOADER:
        model = inputs.get(MODEL_NAME)
        if not isinstance(model, str) or model not in rules.models:
            refuse(
                node_id, f"its input {MODEL_NAME} names no installed model: {rules.models_listed}"
            )


def _needed(nodes: Graph) -> set[str]:
    """The ids of the nodes that the result comes from, which alone ComfyUI runs, and of the one
    that loads the photo."""
    needed: set[str] = set()
    waiting = [*nodes_of(nodes, SAVE), *nodes_of(nodes, LOAD)]
    while waiting:
        node_id = waiting.pop()
        if node_id not in needed:
            needed.add(node_id)
            waiting += [source for _, source in links(nodes[node_id])]
    return needed


def _in_order(nodes: Graph) -> list[str]:
    """Ids, each after those that it needs (Kahn's algorithm: a deep graph is no recursion)."""
    needs = {node_id: {source for _, source in links(node)} for node_id, node in nodes.items()}
    order: list[str] = []
    while ready := [node_id for node_id, sources in needs.items() if not sources.difference(order)]:
        order += ready
        for node_id in ready:
            del needs[node_id]
    if needs:
        refuse(min(needs), "it needs itself, by way of others")
    return order
