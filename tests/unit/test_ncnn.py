"""ncnn files become PyTorch weights with every value and name in its place, or are refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load

from comfy_pool.install.ncnn import (
    FLOAT16_TAG,
    FLOAT32_TAG,
    NcnnFormatError,
    read_state,
    to_safetensors,
)

HEADER = "7767517\n2 2\nInput input 0 1 data"


def convolution(outputs: int, inputs: int, kernel: int = 3, bias: int = 1) -> str:
    size = outputs * inputs * kernel * kernel
    return f"Convolution c 1 1 a b 0={outputs} 1={kernel} 4=1 5={bias} 6={size} -23310=1,2.0e-01"


def prelu(outputs: int) -> str:
    return f"PReLU p 1 1 a b 0={outputs}"


def param(*layers: str) -> str:
    return "\n".join([HEADER, *layers, "PixelShuffle s 1 1 a b 0=4"])


def stored(weights: NDArray[np.float32], half: bool) -> bytes:
    """Return weights as ncnn writes them: a tag, the values, padding to four bytes."""
    data = weights.astype(np.float16 if half else np.float32).tobytes()
    return struct.pack("<I", FLOAT16_TAG if half else FLOAT32_TAG) + data + b"\0" * (-len(data) % 4)


sizes = st.integers(1, 5)


@given(outputs=sizes, inputs=sizes, half=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_values_come_back(outputs: int, inputs: int, half: bool, seed: int) -> None:
    """Weights, biases and slopes of any shape and storage come back exactly, in order."""
    random = np.random.default_rng(seed)
    weights = random.normal(size=(outputs, inputs, 3, 3)).astype(np.float32)
    bias = random.normal(size=outputs).astype(np.float32)
    slopes = random.normal(size=outputs).astype(np.float32)
    text = param(convolution(outputs, inputs), prelu(outputs), convolution(outputs, inputs))
    layer = stored(weights, half) + bias.tobytes()
    state = read_state(text, layer + slopes.tobytes() + layer)
    expected = weights.astype(np.float16 if half else np.float32)
    assert list(state) == [
        *("body.0.weight", "body.0.bias", "body.1.weight", "body.2.weight", "body.2.bias")
    ]
    for name in ("body.0", "body.2"):
        np.testing.assert_array_equal(state[f"{name}.weight"], expected, strict=True)
        np.testing.assert_array_equal(state[f"{name}.bias"], bias, strict=True)
    np.testing.assert_array_equal(state["body.1.weight"], slopes, strict=True)


def test_convolutions_alone_are_an_rrdbnet() -> None:
    """351 convolutions without PReLU get RRDBNet's names, with first and last in their places."""
    layer = stored(np.ones((1, 1, 3, 3), np.float32), half=True) + struct.pack("<f", 1.0)
    last = stored(np.ones((1, 1, 3, 3), np.float32), half=True) + struct.pack("<f", 9.0)
    state = read_state(param(*[convolution(1, 1)] * 351), layer * 350 + last)
    assert len(state) == 702
    assert next(iter(state)) == "conv_first.weight"
    assert "body.22.rdb3.conv5.bias" in state
    assert state["conv_last.bias"] == [9.0]


def test_the_file_is_the_same_each_time() -> None:
    """A manifest pins the sha256 of the converted file, so converting twice gives one file."""
    text = param(convolution(2, 3), prelu(2))
    data = stored(np.ones((2, 3, 3, 3), np.float32), half=True) + bytes(16)
    assert to_safetensors(text, data) == to_safetensors(text, data)
    assert load(to_safetensors(text, data))["body.0.weight"].shape == (2, 3, 3, 3)


GOOD = param(convolution(1, 1), prelu(1))
GOOD_BIN = stored(np.ones((1, 1, 3, 3), np.float32), half=False) + bytes(8)


@pytest.mark.parametrize(
    ("text", "data", "problem"),
    [
        ("", b"", "magic"),
        (GOOD.replace("7767517", "7767518"), GOOD_BIN, "magic"),
        (GOOD, GOOD_BIN[:-4], "ends before"),
        (GOOD, GOOD_BIN + bytes(4), "has data after"),
        (GOOD, b"\x02\0\0\0" + GOOD_BIN[4:], "tag 0x00000002"),
        (param(convolution(1, 1)), GOOD_BIN[:-4], "RRDBNet x4 has 351"),
        (param(convolution(1, 1, bias=0), prelu(1)), GOOD_BIN, "no bias"),
        (GOOD.replace("6=9", "6=many"), GOOD_BIN, "cannot read the layer"),
        (GOOD.replace("6=9", "7=9"), GOOD_BIN, "cannot read the layer"),
        (GOOD.replace("6=9", "6=8"), GOOD_BIN, "do not fit its shape"),
        (GOOD.replace("1=3", "1=0"), GOOD_BIN, "do not fit its shape"),
    ],
)
def test_other_files_are_refused(text: str, data: bytes, problem: str) -> None:
    """A file of another shape than the two known is refused, never turned into wrong weights."""
    with pytest.raises(NcnnFormatError, match=problem):
        to_safetensors(text, data)
