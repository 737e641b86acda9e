"""Check the inputs of one node of a user's graph, by its class if that is known."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from restoration.errors import GraphRefused
from workflows.catalog import MODEL_SUFFIXES
from workflows.node_classes import (
    BOOLEAN,
    COMBO,
    FLOAT,
    IMAGE,
    INT,
    MASK,
    MODEL,
    NODE_CLASSES,
    STRING,
)

# Inputs that multiply pictures; they must be 1, since a job has one result.
_COUNTS = frozenset({"batch_size", "amount", "length", "repeat", "repeats", "frames", "count"})
# Values that the editor's upload button leaves in an export; they are not inputs of the class.
_OF_THE_EDITOR = {"LoadImage": frozenset({"upload", "choose file to upload"})}
_LINKS_ONLY = frozenset({IMAGE, MASK, MODEL})
_NAME = re.compile(r"[A-Za-z0-9_. -]{1,64}")
_MAX_TEXT_CHARS = 1000
# The range of ComfyUI's numbers: 64 bits, signed, or unsigned for seeds.
_LOWEST, _HIGHEST = -(2**63), 2**64 - 1
_MAX_OUTPUT = 15
# Absolute paths of every system, home folders, URLs, and ways up.
_ELSEWHERE = re.compile(r"^\s*[/~]|^\s*[A-Za-z]:|\\|\.\.|//|:/")


@dataclass(frozen=True, slots=True)
class GraphRules:
    """Rules for users' graphs.

    `allowed` lists the node classes, each trusted not to write files, use the network or run code.
    `models` maps each model that a graph may name to its scale: the factor for width and height.
    """

    allowed: frozenset[str]
    models: Mapping[str, int]
    max_nodes: int = 50
    max_inputs: int = 32

    @property
    def models_listed(self) -> str:
        return ", ".join(sorted(self.models))


def refuse(node_id: str | None, problem: str) -> NoReturn:
    """Raise GraphRefused for a node, or for the whole graph if `node_id` is None."""
    where = "" if node_id is None else f"node {node_id}: "
    raise GraphRefused(f"the graph is invalid: {where}{problem}", node=node_id, problem=problem)


@dataclass(frozen=True, slots=True)
class InputChecker:
    """Checks the inputs of node `node_id`. The other nodes of `graph` may be unchecked."""

    node_id: str
    class_type: str
    graph: Mapping[str, object]
    rules: GraphRules

    def check(self, inputs: Mapping[object, object]) -> dict[str, object]:
        """Return the inputs with values converted as ComfyUI does. Raises GraphRefused."""
        known = NODE_CLASSES.get(self.class_type)
        of_editor = _OF_THE_EDITOR.get(self.class_type, frozenset())
        checked: dict[str, object] = {}
        for name, value in inputs.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                self._refuse(
                    "the name of an input must have 1 to 64 letters, digits, dots, hyphens, "
                    "underscores or spaces"
                )
            if known is not None and name not in known.inputs and name not in of_editor:
                having = ", ".join(known.inputs)
                self._refuse(f"{self.class_type} has no input {name}; its inputs are {having}")
            converted = self._checked(name, value)
            if name not in of_editor:
                checked[name] = converted
        return checked

    def _type_of(self, name: str) -> str | None:
        known = NODE_CLASSES.get(self.class_type)
        return known.inputs.get(name) if known else None

    def _checked(self, name: str, value: object) -> object:
        match value:
            case [str(source), int(output)] if not isinstance(output, bool):
                self._check_link(name, source, output)
            case str():
                self._check_text(name, value)
            case bool():
                pass
            case int() | float():
                # `not ... <=` refuses NaN as well
                if not _LOWEST <= value <= _HIGHEST:
                    self._refuse(f"the input {name} must be between -2^63 and 2^64 - 1")
            case _:
                self._refuse(
                    f"the input {name} must be a string, a number, true, false or a link: "
                    "[node id as a string, number of an output]"
                )
        if name in _COUNTS and not (type(value) in {int, float} and value == 1):
            self._refuse(f"the input {name} must be 1, since a job has one result")
        return self._converted(name, value)

    def _converted(self, name: str, value: object) -> object:
        """Convert a value as ComfyUI does, except for texts.

        ComfyUI would convert texts to numbers or to true; here they are refused.
        """
        kind = self._type_of(name)
        if isinstance(value, list):
            if kind == COMBO:
                self._refuse(f"the input {name} must be a string, not a link")
            return value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind in _LINKS_ONLY:
            self._refuse_other_than(name, kind)
        if kind in {INT, FLOAT} and not is_number:
            self._refuse(f"the input {name} must be a number")
        if kind in {STRING, COMBO} and not isinstance(value, str):
            self._refuse(f"the input {name} must be a string")
        if kind == BOOLEAN and not (isinstance(value, bool) or value in (0, 1)):
            self._refuse(f"the input {name} must be true or false")
        if kind == INT and isinstance(value, float):
            return math.trunc(value)
        return bool(value) if kind == BOOLEAN else value

    def _check_link(self, name: str, source: str, output: int) -> None:
        if source not in self.graph:
            self._refuse(f"the input {name} links to a node that is not in the graph")
        node = self.graph[source]
        class_type = node.get("class_type") if isinstance(node, dict) else None
        origin = NODE_CLASSES.get(class_type) if isinstance(class_type, str) else None
        if not 0 <= output <= _MAX_OUTPUT or (origin and output >= len(origin.outputs)):
            having = f"; {class_type} has {len(origin.outputs)} output(s)" if origin else ""
            self._refuse(
                f"the input {name} links to output {output} of node {source}, which does "
                f"not exist{having}"
            )
        wanted = self._type_of(name)
        if origin and wanted not in {None, origin.outputs[output]}:
            self._refuse_other_than(name, str(wanted))

    def _refuse_other_than(self, name: str, kind: str) -> NoReturn:
        sources = sorted(
            each
            for each in self.rules.allowed
            if each in NODE_CLASSES and kind in NODE_CLASSES[each].outputs
        )
        giving = f" (from {', '.join(sources)})" if sources else ""
        self._refuse(f"the input {name} must be a link to an output of the type {kind}{giving}")

    def _check_text(self, name: str, text: str) -> None:
        if len(text) > _MAX_TEXT_CHARS or not text.replace("\n", " ").isprintable():
            self._refuse(
                f"the input {name} must have at most {_MAX_TEXT_CHARS} printable characters"
            )
        if _ELSEWHERE.search(text):
            self._refuse(f"the input {name} looks like a path or a URL, which is not permitted")
        if text.lower().rstrip().endswith(MODEL_SUFFIXES) and text not in self.rules.models:
            self._refuse(
                f"the input {name} names a model that is not installed; choose from "
                f"{self.rules.models_listed}"
            )

    def _refuse(self, problem: str) -> NoReturn:
        refuse(self.node_id, problem)
