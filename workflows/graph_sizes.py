"""Compute the picture sizes in a user's graph before it runs.

Sizes are propagated from the photo to the result. The effect of the classes that change sizes is
known; any other node is assumed to output the largest size among its inputs.
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
# ComfyUI keeps every node's output until the prompt has ended, at 12 bytes for each pixel.
_TOGETHER = 4  # limit for all pictures together, as a multiple of `max_result_pixels`
# ComfyUI feathers pixel by pixel in Python, which cannot be interrupted: seconds for this many.
_MAX_FEATHERED_PIXELS = 1024 * 1024


def check_sizes(
    graph: Graph, rules: GraphRules, width: int, height: int, limits: UploadLimits
) -> tuple[int, int]:
    """Return the result's width and height in pixels for a photo of `width` x `height` pixels.

    `graph` must come from `check_graph` with the same rules. Raises GraphRefused if a picture on
    the way has more than `max_result_pixels`, all together have more than four times as many, or a
    size cannot be determined.
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
                f"its image would have {wide:.0f}x{high:.0f} pixels; the maximum is "
                f"{limits.max_result_pixels} pixels in total and {_MAX_SIDE} on a side",
            )
        sizes[node_id] = size
        together = sum(wide * high for wide, high in sizes.values())
        if together > (max_pixels := _TOGETHER * limits.max_result_pixels):
            refuse(
                node_id,
                f"the images of all nodes up to this one have more than {max_pixels} pixels in "
                "total; use fewer or smaller images",
            )
        if node["class_type"] == SAVE:
            result = size
    return math.ceil(result[0]), math.ceil(result[1])


def _check_feathering(node_id: str, node: Node, size: Size) -> None:
    """Refuse to feather a picture that is too large. `size` is its size before padding."""
    wide, high = size
    if node["inputs"].get("feathering") != 0 and wide * high > _MAX_FEATHERED_PIXELS:
        refuse(
            node_id,
            f"its image of {wide:.0f}x{high:.0f} pixels is too large for feathering, which "
            f"takes at most {_MAX_FEATHERED_PIXELS} pixels in total; set feathering to 0 or "
            "make the image smaller",
        )


def _largest(node: Node, sizes: Mapping[str, Size]) -> Size:
    """Return the largest width and height of the inputs.

    For ImageBlend only `image1` counts: ComfyUI resizes the second picture to the first.
    """
    only = "image1" if node["class_type"] == "ImageBlend" else None
    incoming = [sizes[source] for name, source in links(node) if only in {None, name}]
    return max((w for w, _ in incoming), default=0), max((h for _, h in incoming), default=0)


def _model_scale(node_id: str, graph: Graph, rules: GraphRules) -> int:
    match graph[node_id]["inputs"].get("upscale_model"):
        case [source, _] if graph[source]["class_type"] == MODEL_LOADER:
            return rules.models[graph[source]["inputs"][MODEL_NAME]]
    refuse(node_id, f"the input upscale_model must come from {MODEL_LOADER}")


class _Numbers:
    """The numeric inputs of a node. Each one used must be present as a literal number.

    ComfyUI would also accept a text; the value of a link is not known before the run.
    """

    def __init__(self, node_id: str, inputs: Inputs) -> None:
        self._node_id = node_id
        self._inputs = inputs

    def __getitem__(self, name: str) -> float:
        value = self._inputs.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            refuse(self._node_id, f"the input {name} must be a number of at least 0")
        return float(value)

    def positive(self, name: str) -> float:
        value = self[name]
        if value == 0:
            refuse(self._node_id, f"the input {name} must be greater than 0")
        return value

    def text(self, name: str) -> str:
        value = self._inputs.get(name)
        if not isinstance(value, str):
            refuse(self._node_id, f"the input {name} must be a string")
        return value


def _to_total_pixels(size: Size, numbers: _Numbers) -> Size:
    pixels = numbers["megapixels"] * 1024 * 1024
    return _times(size, math.sqrt(pixels / max(size[0] * size[1], 1)))


def _turned(size: Size, numbers: _Numbers) -> Size:
    """Swap width and height for quarter turns. Like ComfyUI, read only the start of the text."""
    quarter = numbers.text("rotation").startswith(("90", "270"))
    return (size[1], size[0]) if quarter else size


def _times(size: Size, factor: float) -> Size:
    return size[0] * factor, size[1] * factor


_CHANGES: Mapping[str, Callable[[Size, _Numbers], Size]] = {
    "ImageScaleBy": lambda size, n: _times(size, n["scale_by"]),
    # with 0, ComfyUI keeps proportions that are not known here
    "ImageScale": lambda _, n: (n.positive("width"), n.positive("height")),
    "ImageScaleToTotalPixels": _to_total_pixels,
    "ImageScaleToMaxDimension": lambda _, n: (n["largest_size"], n["largest_size"]),
    PAD: lambda size, n: (size[0] + n["left"] + n["right"], size[1] + n["top"] + n["bottom"]),
    "ImageCrop": lambda size, n: (min(size[0], n["width"]), min(size[1], n["height"])),
    "ImageRotate": _turned,
}
