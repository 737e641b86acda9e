"""Convert a pair of ncnn files to the PyTorch weights they were made from, without I/O.

Supports the two architectures of Real-ESRGAN: RRDBNet and the compact one. An ncnn `.bin` file
holds the weights of the `.param` file's layers in order, without names; the names follow from the
order. Values keep their stored type (float16 weights, float32 biases), so the conversion is
lossless and deterministic. Source: github.com/Tencent/ncnn/wiki, "param and model file structure".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

FLOAT16_TAG = 0x01306B47
FLOAT32_TAG = 0
_MAGIC = "7767517"
Stored = np.float16 | np.float32 | np.uint32
Weights = NDArray[Stored]


class NcnnFormatError(ValueError):
    """The files are not a supported ncnn model."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer with weights. `size` is the weight count of a Convolution, 0 for a PReLU."""

    kind: str
    outputs: int
    kernel: int = 0
    size: int = 0


def parse_param(text: str) -> list[Layer]:
    """Return the layers with weights, in order. Raises NcnnFormatError."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != _MAGIC:
        raise NcnnFormatError("not an ncnn .param file: the first line is not the magic number")
    return [layer for line in lines[2:] if (layer := _layer(line.split())) is not None]


def _layer(words: list[str]) -> Layer | None:
    """Parse `kind name inputs outputs blob... key=value...`, whose keys are ncnn's numbers.

    Return None for a layer without weights.
    """
    if not words or words[0] not in {"Convolution", "PReLU"}:
        return None
    values = dict(word.split("=", 1) for word in words if "=" in word)
    try:
        if words[0] == "PReLU":
            return Layer("PReLU", int(values["0"]))
        outputs, kernel, size = int(values["0"]), int(values["1"]), int(values["6"])
    except (KeyError, ValueError) as error:
        raise NcnnFormatError(f"cannot read the layer {' '.join(words)!r}: {error}") from error
    if values.get("5") != "1":
        raise NcnnFormatError(f"{words[1]} has no bias; all convolutions of Real-ESRGAN have one")
    per_input = outputs * kernel * kernel
    if per_input <= 0 or size % per_input:
        raise NcnnFormatError(f"{words[1]}: its {size} weights do not fit its shape")
    return Layer("Convolution", outputs, kernel, size)


class _Reader:
    """Reads consecutive arrays from the bytes of a `.bin` file."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int, dtype: type[Stored]) -> Weights:
        end = self._at + count * np.dtype(dtype).itemsize
        if end > len(self._data):
            raise NcnnFormatError("the .bin ends before the last layer's weights")
        values: Weights = np.frombuffer(self._data[self._at : end], dtype)
        self._at = end + -end % 4
        return values

    def weights(self, count: int) -> Weights:
        """Read a tag with the storage type, then `count` weights of that type."""
        tag = int(self.take(1, np.uint32)[0])
        if tag not in {FLOAT16_TAG, FLOAT32_TAG}:
            raise NcnnFormatError(f"weights are stored in an unknown format (tag {tag:#010x})")
        return self.take(count, np.float16 if tag == FLOAT16_TAG else np.float32)

    def check_end(self) -> None:
        if self._at != len(self._data):
            raise NcnnFormatError("the .bin has data after the last layer's weights")


def read_state(param: str, binary: bytes) -> dict[str, Weights]:
    """Return the PyTorch state dictionary with Real-ESRGAN's keys. Raises NcnnFormatError."""
    layers = parse_param(param)
    reader = _Reader(binary)
    state: dict[str, Weights] = {}
    for name, layer in zip(_names(layers), layers, strict=True):
        if layer.kind == "PReLU":
            state[f"{name}.weight"] = reader.take(layer.outputs, np.float32)
            continue
        weights = reader.weights(layer.size)
        state[f"{name}.weight"] = weights.reshape(layer.outputs, -1, layer.kernel, layer.kernel)
        state[f"{name}.bias"] = reader.take(layer.outputs, np.float32)
    reader.check_end()
    return state


def to_safetensors(param: str, binary: bytes) -> bytes:
    """Return a safetensors file; equal input gives equal bytes. Raises NcnnFormatError."""
    return save(read_state(param, binary))


def _names(layers: list[Layer]) -> list[str]:
    if any(layer.kind == "PReLU" for layer in layers):
        return [f"body.{index}" for index in range(len(layers))]
    names = list(_rrdbnet_names())
    if len(names) != len(layers):
        raise NcnnFormatError(
            f"the file has {len(layers)} convolutions; RRDBNet x4 has {len(names)}"
        )
    return names


def _rrdbnet_names() -> Iterator[str]:
    yield "conv_first"
    for block in range(23):
        for dense in range(1, 4):
            for conv in range(1, 6):
                yield f"body.{block}.rdb{dense}.conv{conv}"
    yield from ("conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last")
