"""What goes into the engine and comes out of it: upright, transparency kept, colours right."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from actors.conversion import encode, prepare
from restoration.engine import Pixels
from restoration.images import ImageType
from restoration.jobs import OutputFormat
from tests.pictures import (
    ACCEPTED,
    HEIGHT,
    WIDTH,
    deep_grey,
    file,
    noise,
    sideways,
    swapped_primaries,
)


def decoded(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def half_transparent() -> Image.Image:
    """Opaque on the left, transparent on the right."""
    picture = noise("RGBA")
    picture.paste((255, 0, 0, 0), (WIDTH // 2, 0, WIDTH, HEIGHT))
    return picture


class TestPrepare:
    @pytest.mark.parametrize("name", [name for name in ACCEPTED if "grey of 16" not in name])
    def test_what_comfyui_reads_right_is_left_alone(self, name: str) -> None:
        """To the byte: the engine gets what was uploaded."""
        kind, data = ACCEPTED[name]
        prepared = prepare(data)
        assert (prepared.data, prepared.type, prepared.alpha) == (data, kind, None)

    @pytest.mark.parametrize("format", ["PNG", "TIFF"])
    def test_deep_greys_keep_their_shades(self, format: str) -> None:
        """Black, white and all between come out in 8 bits, where ComfyUI would make it white."""
        image = decoded(prepare(file(deep_grey(), format)).data)
        assert (image.format, image.mode, image.size) == ("PNG", "L", (WIDTH, HEIGHT))
        assert np.array_equal(np.asarray(image), np.asarray(deep_grey()) >> 8)
        assert image.getextrema() == (0, 255)

    @pytest.mark.parametrize("picture", [deep_grey(), half_transparent()], ids=["grey", "alpha"])
    def test_what_is_converted_is_turned_upright(self, picture: Image.Image) -> None:
        """A photo on its side is turned here, and its transparency with it."""
        prepared = prepare(file(picture, "PNG", exif=sideways()))
        image = decoded(prepared.data)
        assert image.size == (HEIGHT, WIDTH)
        assert 0x0112 not in image.getexif()  # or ComfyUI would turn it once more
        if prepared.alpha is not None:
            assert prepared.alpha.size == image.size

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_05_on_white_nothing_is_kept_aside(self, mode: str) -> None:
        """What is seen through shows white, not the colour that lies hidden there."""
        picture = half_transparent().convert(mode)
        prepared = prepare(file(picture, "PNG"), on_white=True)
        assert prepared.alpha is None
        shown = np.asarray(decoded(prepared.data))
        assert (shown[:, 34:] == 255).all()
        assert (shown[:, :30] == np.asarray(picture.convert("RGB"))[:, :30]).all()

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
    def test_transparency_is_kept_aside(self, mode: str) -> None:
        """The engine gets opaque colours; which pixels were seen through is remembered."""
        picture = half_transparent()
        if mode == "P":
            data = file(picture.quantize(), "PNG")
        else:
            data = file(picture.convert(mode), "TIFF" if mode == "PA" else "PNG")
        prepared = prepare(data)
        assert prepared.type is ImageType.PNG
        assert decoded(prepared.data).mode == "RGB"
        assert prepared.alpha is not None
        left, right = (np.asarray(prepared.alpha)[:, half] for half in (slice(30), slice(34, None)))
        assert left.min() == 255
        assert right.max() == 0

    def test_colours_of_another_profile_are_converted(self) -> None:
        """A picture in a camera's colours looks the same in sRGB, which ComfyUI assumes."""
        swapped = swapped_primaries()
        picture = Image.new("RGB", (4, 4), (200, 30, 30))
        converted = decoded(prepare(file(picture, "PNG", icc_profile=swapped)).data)
        red, green, _ = converted.getpixel((0, 0))  # type: ignore[misc] # three channels
        assert green > red

    def test_a_broken_profile_says_nothing(self) -> None:
        """Colours stay as they are when the profile cannot be read."""
        data = file(noise(), "PNG", icc_profile=b"not a profile")
        assert prepare(data).data == data

    def test_srgb_needs_no_conversion(self) -> None:
        """The most common profile of all changes no byte."""
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        data = file(noise(), "PNG", icc_profile=srgb)
        assert prepare(data).data == data


def handed_over(picture: Image.Image, path: Path) -> Pixels:
    path.write_bytes(picture.tobytes())
    return Pixels(path, picture.width, picture.height, len(picture.getbands()))


class TestEncode:
    def test_a_png_is_untouched(self) -> None:
        """The engine's bytes are the result's, to the bit."""
        png = ACCEPTED["png"][1]
        assert encode(png, OutputFormat.PNG, 1) is png

    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
    def test_02_pixels_become_a_png_of_those_pixels(self, tmp_path: Path, mode: str) -> None:
        """What was handed over comes out of the file again, whatever its channels."""
        picture = noise(mode)
        pixels = handed_over(picture, tmp_path / "pixels")
        result = decoded(encode(pixels, OutputFormat.PNG, 1))
        assert result.mode == mode
        assert np.array_equal(np.asarray(result), np.asarray(picture))

    @pytest.mark.parametrize("wanted", list(OutputFormat))
    def test_02_pixels_and_their_png_come_out_alike(
        self, tmp_path: Path, wanted: OutputFormat
    ) -> None:
        """In each format, with transparency too: the same picture, however it came."""
        pixels = handed_over(noise(), tmp_path / "pixels")
        alpha = half_transparent().getchannel("A")
        for kept_aside in (None, alpha):
            results = [
                decoded(encode(came, wanted, 90, kept_aside))
                for came in (pixels, file(noise(), "PNG"))
            ]
            assert results[0].mode == results[1].mode
            assert np.array_equal(np.asarray(results[0]), np.asarray(results[1]))

    @pytest.mark.parametrize("wanted", [OutputFormat.JPEG, OutputFormat.WEBP])
    def test_the_format_is_the_one_asked_for(self, wanted: OutputFormat) -> None:
        """The picture is the same size in the other format, and close to what it was."""
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
        """At the size of the result, in the formats that have it."""
        alpha = half_transparent().getchannel("A")
        large = file(noise(size=(4 * WIDTH, 4 * HEIGHT)), "PNG")
        result = decoded(encode(large, wanted, 90, alpha))
        assert (result.mode, result.size) == ("RGBA", (4 * WIDTH, 4 * HEIGHT))
        seen = np.asarray(result.getchannel("A"))
        assert seen[:, : 2 * WIDTH - 8].min() > 250
        assert seen[:, 2 * WIDTH + 8 :].max() < 5

    def test_jpeg_shows_white_where_nothing_was(self) -> None:
        """JPEG has no transparency; what was seen through is white, not black."""
        alpha = half_transparent().getchannel("A")
        result = decoded(encode(file(noise(), "PNG"), OutputFormat.JPEG, 95, alpha))
        assert np.asarray(result)[:, WIDTH - 16 :].min() > 240
