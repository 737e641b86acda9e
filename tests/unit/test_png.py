"""The PNG writer: any reader finds the same pixels, and nothing else."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from actors.images.png import chunks, png_of
from tests.support.photos import original

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def read(png: bytes) -> Image.Image:
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        image.load()  # a reader that verifies each checksum
        return image


def pixels(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.pixels
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from(sorted(MODES)),
    seed=st.integers(0, 2**32 - 1),
)
def test_pixels_come_back_as_they_were(height: int, width: int, channels: int, seed: int) -> None:
    """This holds for every shape, number of channels and value."""
    picture = pixels(height, width, channels, seed)
    image = read(png_of(picture))
    assert image.mode == MODES[channels]
    assert np.array_equal(np.asarray(image).reshape(picture.shape), picture)


@pytest.mark.pixels
@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize(("height", "width"), [(3000, 1500), (2, 5_000_000)])
def test_a_picture_of_many_bands_has_no_seams(height: int, width: int, channels: int) -> None:
    """Rows at the edges of bands are right, also where a single row exceeds a band."""
    picture = pixels(height, width, channels)
    image = read(png_of(picture))
    assert np.array_equal(np.asarray(image).reshape(picture.shape), picture)


@pytest.mark.pixels
@pytest.mark.parametrize("mode", MODES.values())
def test_an_image_is_written_like_the_array_of_its_pixels(mode: str) -> None:
    """The files are identical."""
    image = original("china").convert(mode)
    rows = np.asarray(image).reshape(image.height, image.width, -1)
    assert png_of(image) == png_of(rows)


@pytest.mark.pixels
def test_there_is_nothing_but_the_pixels() -> None:
    """The file has no time, software or text: only the chunks that PNG requires."""
    names = [name for name, _ in chunks(png_of(original("china")))]
    assert set(names) == {b"IHDR", b"IDAT", b"IEND"}


@pytest.mark.pixels
def test_a_photo_is_about_as_small_as_others_make_it() -> None:
    """It is at most an eighth larger than Pillow's at ComfyUI's compression level."""
    photo, theirs = original("flower"), io.BytesIO()
    photo.save(theirs, "PNG", compress_level=4)
    assert len(png_of(photo)) < 1.125 * len(theirs.getvalue())
