"""What a user's own graph may contain, node by node. Pure.

`check_graph` takes anything that JSON can hold, and gives back a graph rebuilt from the parts that
were looked at: nothing else of what was sent reaches an engine. Its only exception is GraphRefused,
which names the node and says why. How large pictures become in it is in `workflows.graph_sizes`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from restoration.errors import GraphRefused
from workflows.catalog import MODEL_SUFFIXES

Node = Mapping[str, Any]  # {"class_type": ..., "inputs": {name: value or [node id, output]}}
Graph = Mapping[str, Node]

LOAD, SAVE = "LoadImage", "SaveImage"
# What LoadImage names as its file: the form's field that holds the photo.
PHOTO = "image"
MODEL_LOADER, MODEL_NAME = "UpscaleModelLoader", "model_name"
_PAD, _PADDING_MASK = "ImagePadForOutpaint", 1  # the output that is the mask
# Their pixels come out elsewhere than they came in.
_MOVING = frozenset({"ImageCrop", _PAD, "ImageFlip", "ImageRotate"})
# Inputs that make many pictures of one: there is one result.
_COUNTS = frozenset({"batch_size", "amount", "length", "repeat", "repeats", "frames", "count"})

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_NAME = re.compile(r"[A-Za-z0-9_. -]{1,64}")
_MAX_TEXT_CHARS = 1000
_MAX_NUMBER = 1e9
_MAX_OUTPUT = 15
# Absolute paths of every system, home folders, URLs, and ways up.
_ELSEWHERE = re.compile(r"^\s*[/~]|^\s*[A-Za-z]:|\\|\.\.|//|:/")


@dataclass(frozen=True, slots=True)
class GraphRules:
    """`allowed` node classes, each of them trusted not to write, reach the network or run code;
    `models` that may be named, with how many times as wide and high each makes a picture."""

    allowed: frozenset[str]
    models: Mapping[str, int]
    max_nodes: int = 50
    max_inputs: int = 32


def check_graph(graph: object, rules: GraphRules) -> dict[str, Node]:
    """The graph, rebuilt, in an order in which every node comes after those that it needs.

    It has one LoadImage and one SaveImage, whose file names are left to whoever runs it. Raises
    GraphRefused.
    """
    if not isinstance(graph, dict) or not 0 < len(graph) <= rules.max_nodes:
        refuse(None, f"a graph is a JSON object of 1 to {rules.max_nodes} nodes by their ids")
    nodes = {node_id: _checked(node_id, node, graph, rules) for node_id, node in graph.items()}
    for only in (LOAD, SAVE):
        if (found := len(nodes_of(nodes, only))) != 1:
            refuse(None, f"the graph must have one {only} node; it has {found}")
    return {node_id: _without_feathering(node_id, nodes) for node_id in _in_order(nodes)}


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


def refuse(node_id: str | None, problem: str) -> NoReturn:
    where = "" if node_id is None else f"node {node_id}: "
    raise GraphRefused(f"the graph is refused: {where}{problem}", node=node_id, problem=problem)


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
    checked = {
        name: _checked_input(node_id, name, value, graph, rules) for name, value in inputs.items()
    }
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
    if node["class_type"] != _PAD or any(mask in n["inputs"].values() for n in nodes.values()):
        return node
    return {**node, "inputs": {**node["inputs"], "feathering": 0}}


def _checked_input(
    node_id: str, name: object, value: object, graph: Mapping[str, object], rules: GraphRules
) -> object:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        refuse(node_id, "an input's name has 1 to 64 letters, digits, dots, hyphens, underscores")
    match value:
        case [str(source), int(output)] if not isinstance(output, bool):
            if source not in graph:
                refuse(node_id, f"its input {name} comes from a node that is not in the graph")
            if not 0 <= output <= _MAX_OUTPUT:
                refuse(node_id, f"its input {name} comes from an output that no node has")
        case str():
            _check_text(node_id, name, value, rules)
        case bool():
            pass
        case int() | float():
            # written so that what is not a number is refused as well
            if not -_MAX_NUMBER <= value <= _MAX_NUMBER:
                refuse(node_id, f"its input {name} must be within a thousand million of 0")
        case _:
            refuse(node_id, f"its input {name} must be a text, a number, true, false or a link")
    if name in _COUNTS and not (type(value) in {int, float} and value == 1):
        refuse(node_id, f"its input {name} must be 1: there is one result")
    return value


def _check_text(node_id: str, name: str, text: str, rules: GraphRules) -> None:
    if len(text) > _MAX_TEXT_CHARS or not text.replace("\n", " ").isprintable():
        refuse(node_id, f"its input {name} has at most {_MAX_TEXT_CHARS} printable characters")
    if _ELSEWHERE.search(text):
        refuse(node_id, f"its input {name} looks like a path or an address, which no node may have")
    if text.lower().rstrip().endswith(MODEL_SUFFIXES) and text not in rules.models:
        refuse(node_id, f"its input {name} names no installed model: {_listed(rules)}")


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
            refuse(node_id, f"its input {MODEL_NAME} names no installed model: {_listed(rules)}")


def _listed(rules: GraphRules) -> str:
    return ", ".join(sorted(rules.models))


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
