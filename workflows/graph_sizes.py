"""How large the pictures in a user's graph become, before it runs. Pure.

Each node's output is followed from the photo's size to the result. What a node does to sizes is
known for the classes that change them; any other gives out as much as the largest that it gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from restoration.images import UploadLimits
from workflows.graphs import (
    LOAD,
    MODEL_LOADER,
    MODEL_NAME,
    PAD,
    SAVE,
    Graph,
    GraphRules,
    Node,
    links,
    refuse,
)

Size = tuple[float, float]  # width and height in pixels
Inputs = Mapping[str, Any]

_BY_MODEL = "ImageUpscaleWithModel"
_MAX_SIDE = 65_535
# ComfyUI keeps what every node made until the prompt has ended: 12 bytes a pixel.
_TOGETHER = 4  # times what a result may have
# ComfyUI feathers pixel by pixel in Python, some seconds for so many, and cannot be interrupted.
_MAX_FEATHERED_PIXELS = 1024 * 1024


def check_sizes(
    graph: Graph, rules: GraphRules, width: int, height: int, limits: UploadLimits
) -> tuple[int, int]:
    """The result's width and height for a photo of that size.

    `graph` is what `check_graph` returned under the same rules. Raises GraphRefused where a picture
    on the way is larger than a result may be, all of them together are than several, or a size
    cannot be told.
    """
    sizes: dict[str, Size] = {}
    result: Size = (width, height)
    for node_id, node in graph.items():
        size = (width, height) if node["class_type"] == LOAD else _largest(node, sizes)
        if node["class_type"] == _BY_MODEL:
            size = _times(size, _model_scale(node_id, graph, rules))
        if node["class_type"] == PAD:
            _check_feathering(node_id, node, size)
        if (change := _CHANGES.get(node["class_type"])) is not None:
            size = change(size, _Numbers(node_id, node["inputs"]))
        wide, high = size
        if wide * high > limits.max_result_pixels or max(size) > _MAX_SIDE:
            refuse(
                node_id,
                f"it makes a picture of {wide:.0f}x{high:.0f} pixels; at most "
                f"{limits.max_result_pixels} are made, and no side above {_MAX_SIDE}",
            )
        sizes[node_id] = size
        _check_together(node_id, sizes, _TOGETHER * limits.max_result_pixels)
        if node["class_type"] == SAVE:
            result = size
    return math.ceil(result[0]), math.ceil(result[1])


def _check_together(node_id: str, sizes: Mapping[str, Size], max_pixels: int) -> None:
    if sum(wide * high for wide, high in sizes.values()) > max_pixels:
        refuse(
            node_id,
            f"with its picture the graph's have more than {max_pixels} pixels together, "
            "and all are kept until its end; make fewer, or smaller ones",
        )


def _check_feathering(node_id: str, node: Node, size: Size) -> None:
    """`size` is that of the picture before it is padded."""
    wide, high = size
    if node["inputs"].get("feathering") != 0 and wide * high > _MAX_FEATHERED_PIXELS:
        refuse(
            node_id,
            f"it feathers a picture of {wide:.0f}x{high:.0f} pixels; at most "
            f"{_MAX_FEATHERED_PIXELS} are feathered: set feathering to 0, or make it smaller",
        )


def _largest(node: Node, sizes: Mapping[str, Size]) -> Size:
    """Of what comes in. ImageBlend fits its second picture to its first."""
    only = "image1" if node["class_type"] == "ImageBlend" else None
    incoming = [sizes[source] for name, source in links(node) if only in {None, name}]
    return max((w for w, _ in incoming), default=0), max((h for _, h in incoming), default=0)


def _model_scale(node_id: str, graph: Graph, rules: GraphRules) -> int:
    match graph[node_id]["inputs"].get("upscale_model"):
        case [source, _] if graph[source]["class_type"] == MODEL_LOADER:
            return rules.models[graph[source]["inputs"][MODEL_NAME]]
    refuse(node_id, f"its input upscale_model must come from an {MODEL_LOADER}")


class _Numbers:
    """A node's numbers by their names. They must be there, and as themselves: ComfyUI would take
    a text for one, and a link could be any."""

    def __init__(self, node_id: str, inputs: Inputs) -> None:
        self._node_id = node_id
        self._inputs = inputs

    def __getitem__(self, name: str) -> float:
        value = self._inputs.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            refuse(self._node_id, f"its input {name} must be a number of 0 or more")
        return float(value)

    def positive(self, name: str) -> float:
        value = self[name]
        if value == 0:
            refuse(self._node_id, f"its input {name} must be above 0")
        return value

    def text(self, name: str) -> str:
        value = self._inputs.get(name)
        if not isinstance(value, str):
            refuse(self._node_id, f"its input {name} must be a text")
        return value


def _scaled(size: Size, numbers: _Numbers) -> Size:
    return _times(size, numbers["scale_by"])


def _to_width_and_height(_: Size, numbers: _Numbers) -> Size:
    """ComfyUI takes 0 for "as the proportions are", which may be anything by then."""
    return numbers.positive("width"), numbers.positive("height")


def _to_total_pixels(size: Size, numbers: _Numbers) -> Size:
    pixels = numbers["megapixels"] * 1024 * 1024
    return _times(size, math.sqrt(pixels / max(size[0] * size[1], 1)))


def _to_max_dimension(_: Size, numbers: _Numbers) -> Size:
    return numbers["largest_size"], numbers["largest_size"]


def _padded(size: Size, numbers: _Numbers) -> Size:
    wide = numbers["left"] + numbers["right"]
    high = numbers["top"] + numbers["bottom"]
    return size[0] + wide, size[1] + high


def _cropped(size: Size, numbers: _Numbers) -> Size:
    return min(size[0], numbers["width"]), min(size[1], numbers["height"])


def _turned(size: Size, numbers: _Numbers) -> Size:
    """As ComfyUI reads it: by how the text begins."""
    quarter = numbers.text("rotation").startswith(("90", "270"))
    return (size[1], size[0]) if quarter else size


def _times(size: Size, factor: float) -> Size:
    return size[0] * factor, size[1] * factor


_CHANGES: Mapping[str, Callable[[Size, _Numbers], Size]] = {
    "ImageScaleBy": _scaled,
    "ImageScale": _to_width_and_height,
    "ImageScaleToTotalPixels": _to_total_pixels,
    "ImageScaleToMaxDimension": _to_max_dimension,
    PAD: _padded,
    "ImageCrop": _cropped,
    "ImageRotate": _turned,
}
