"""The engine's input and output: upright, with transparency kept and colours right."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from actors.images.encode import encode, engine_input
from actors.images.reader import read
from restoration.images import UploadLimits
from restoration.jobs import OutputFormat
from tests.support.pictures import (
    ACCEPTED,
    HEIGHT,
    WIDTH,
    deep_grey,
    file,
    noise,
    sideways,
    swapped_primaries,
)

LIMITS = UploadLimits()


def decoded(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def half_transparent() -> Image.Image:
    """Return a picture that is opaque on the left and transparent on the right."""
    picture = noise("RGBA")
    picture.paste((255, 0, 0, 0), (WIDTH // 2, 0, WIDTH, HEIGHT))
    return picture


class TestRead:
    @pytest.mark.parametrize("format", ["PNG", "TIFF"])
    def test_deep_greys_keep_their_shades(self, format: str) -> None:
        """Black, white and the shades between become 8-bit; ComfyUI would make them white."""
        image = read(file(deep_grey(), format), LIMITS)
        assert image.is_grey
        assert np.array_equal(image.pixels[:, :, 0], np.round(np.asarray(deep_grey()) / 257))

    @pytest.mark.parametrize("picture", [deep_grey(), half_transparent()], ids=["grey", "alpha"])
    def test_a_photo_on_its_side_is_turned_upright(self, picture: Image.Image) -> None:
        """Its transparency is turned with it."""
        image = read(file(picture, "PNG", exif=sideways()), LIMITS)
        assert image.pixels.shape[:2] == (WIDTH, HEIGHT)
        if image.alpha is not None:
            assert image.alpha.shape == (WIDTH, HEIGHT)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
    def test_transparency_is_kept_apart(self, mode: str) -> None:
        """This holds for every mode with transparency."""
        picture = half_transparent()
        if mode == "P":
            data = file(picture.quantize(), "PNG")
        else:
            data = file(picture.convert(mode), "TIFF" if mode == "PA" else "PNG")
        image = read(data, LIMITS)
        assert image.alpha is not None
        assert image.alpha[:, :30].min() == 255
        assert image.alpha[:, 34:].max() == 0

    def test_colours_of_another_profile_are_converted(self) -> None:
        """A picture in a camera's colours looks the same in sRGB, which ComfyUI assumes."""
        picture = Image.new("RGB", (4, 4), (200, 30, 30))
        image = read(file(picture, "PNG", icc_profile=swapped_primaries()), LIMITS)
        red, green, _ = image.pixels[0, 0]
        assert green > red

    def test_a_broken_profile_changes_no_pixel(self) -> None:
        """Colours stay unchanged when the profile cannot be read."""
        image = read(file(noise(), "PNG", icc_profile=b"not a profile"), LIMITS)
        assert np.array_equal(image.pixels, np.asarray(noise()))

    @pytest.mark.parametrize("mode", ["L", "RGB"])
    def test_a_picture_without_colours_has_one_channel(self, mode: str) -> None:
        """This holds whether its file has one channel or three equal ones."""
        image = read(file(noise("L").convert(mode), "PNG"), LIMITS)
        assert image.is_grey
        assert np.array_equal(image.pixels[:, :, 0], np.asarray(noise("L")))


class TestEngineInput:
    @pytest.mark.parametrize("name", ACCEPTED)
    def test_comfyui_reads_the_pixels_that_were_read(self, name: str) -> None:
        """The pixels are identical: LoadImage opens the file with Pillow and converts it to RGB."""
        image = read(ACCEPTED[name][1], LIMITS)
        data, _ = engine_input(image, on_white=False)
        shown = np.broadcast_to(image.pixels, (*image.pixels.shape[:2], 3))
        assert np.array_equal(np.asarray(decoded(data).convert("RGB")), shown)

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_on_white_no_alpha_is_kept_aside(self, mode: str) -> None:
        """A transparent part becomes white, not the colour hidden there."""
        picture = half_transparent().convert(mode)
        data, alpha = engine_input(read(file(picture, "PNG"), LIMITS), on_white=True)
        assert alpha is None
        shown = np.asarray(decoded(data).convert("RGB"))
        assert (shown[:, 34:] == 255).all()
        assert (shown[:, :30] == np.asarray(picture.convert("RGB"))[:, :30]).all()


def handed_over(picture: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


class TestEncode:
    def test_a_png_is_untouched(self) -> None:
        """The result has exactly the engine's bytes."""
        png = ACCEPTED["png"][1]
        assert encode(png, OutputFormat.PNG, 1) is png

    @pytest.mark.pixels
    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
    def test_pixels_become_a_png_of_those_pixels(self, mode: str) -> None:
        """The file holds exactly the pixels given, for any number of channels."""
        picture = noise(mode)
        pixels = handed_over(picture)
        result = decoded(encode(pixels, OutputFormat.PNG, 1))
        assert result.mode == mode
        assert np.array_equal(np.asarray(result), np.asarray(picture))

    @pytest.mark.pixels
    @pytest.mark.parametrize("wanted", list(OutputFormat))
    def test_pixels_and_their_png_come_out_alike(self, wanted: OutputFormat) -> None:
        """Pixels and a PNG give the same picture in each format, with transparency too."""
        pixels = handed_over(noise())
        alpha = np.asarray(half_transparent().getchannel("A"))
        for kept_aside in (None, alpha):
            results = [
                decoded(encode(came, wanted, 90, kept_aside))
                for came in (pixels, file(noise(), "PNG"))
            ]
            assert results[0].mode == results[1].mode
            assert np.array_equal(np.asarray(results[0]), np.asarray(results[1]))

    @pytest.mark.parametrize("wanted", [OutputFormat.JPEG, OutputFormat.WEBP])
    def test_the_format_is_the_one_asked_for(self, wanted: OutputFormat) -> None:
        """The picture keeps its size in the other format and stays close to the original."""
        smooth = Image.linear_gradient("L").convert("RGB")
        with Image.open(io.BytesIO(encode(file(smooth, "PNG"), wanted, 95))) as image:
            assert (image.format, image.size) == (wanted.upper(), smooth.size)
            difference = np.abs(np.asarray(image).astype(int) - np.asarray(smooth))
        assert difference.max() < 12

    @pytest.mark.parametrize("wanted", [OutputFormat.JPEG, OutputFormat.WEBP])
    def test_quality_is_paid_in_bytes(self, wanted: OutputFormat) -> None:
        """A higher quality makes a larger file, over the whole range from 1 to 100."""
        sizes = [len(encode(ACCEPTED["png"][1], wanted, quality)) for quality in (1, 50, 90, 100)]
        assert sizes == sorted(set(sizes))

    @pytest.mark.parametrize("wanted", [OutputFormat.JPEG, OutputFormat.WEBP])
    def test_transparency_does_not_stop_it(self, wanted: OutputFormat) -> None:
        """A PNG with alpha, from a workflow that makes one, is written without it."""
        with Image.open(io.BytesIO(encode(file(noise("RGBA"), "PNG"), wanted, 90))) as image:
            assert image.mode == "RGB"

    @pytest.mark.parametrize("wanted", [OutputFormat.PNG, OutputFormat.WEBP])
    def test_transparency_is_put_back(self, wanted: OutputFormat) -> None:
        """It gets the size of the result, in the formats that support it."""
        alpha = np.asarray(half_transparent().getchannel("A"))
        large = file(noise(size=(4 * WIDTH, 4 * HEIGHT)), "PNG")
        result = decoded(encode(large, wanted, 90, alpha))
        assert (result.mode, result.size) == ("RGBA", (4 * WIDTH, 4 * HEIGHT))
        seen = np.asarray(result.getchannel("A"))
        assert seen[:, : 2 * WIDTH - 8].min() > 250
        assert seen[:, 2 * WIDTH + 8 :].max() < 5

    def test_jpeg_shows_white_where_nothing_was(self) -> None:
        """JPEG has no transparency: transparent parts become white, not black."""
        alpha = np.asarray(half_transparent().getchannel("A"))
        result = decoded(encode(file(noise(), "PNG"), OutputFormat.JPEG, 95, alpha))
        assert np.asarray(result)[:, WIDTH - 16 :].min() > 240

    @pytest.mark.parametrize("wanted", list(OutputFormat))
    @pytest.mark.parametrize("with_alpha", [False, True])
    def test_a_grey_photo_has_a_grey_result(self, wanted: OutputFormat, with_alpha: bool) -> None:
        """R, G and B of every pixel are equal, though the engine tinted them."""
        alpha = np.asarray(half_transparent().getchannel("A")) if with_alpha else None
        for came in (handed_over(noise()), file(noise(), "PNG")):
            data = encode(came, wanted, 90, alpha, None, grey=True)
            red, green, blue = np.moveaxis(np.asarray(decoded(data).convert("RGB")), 2, 0)
            assert np.array_equal(red, green)
            assert np.array_equal(green, blue)
