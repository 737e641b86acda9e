"""Each file of the corpus and its variants is read as a person sees it, or refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from actors.images.encode import engine_input
from actors.images.reader import NormalisedImage, examine, read
from restoration.errors import InvalidRequest
from restoration.images import UploadLimits
from tests.corpus import Case, Refused, corpus, difference, siblings, slug

LIMITS = UploadLimits()
TOLERANCE = 8  # of 255, in the middle of a quarter: compression and rounded samples
CASES = [*corpus(), *siblings()]
ACCEPTED = [case for case in CASES if isinstance(case.expected, Image.Image)]
REFUSED = [case for case in CASES if isinstance(case.expected, Refused)]


def shown(image: NormalisedImage) -> Image.Image:
    rgb = np.broadcast_to(image.pixels, (*image.pixels.shape[:2], 3))
    picture = Image.fromarray(np.ascontiguousarray(rgb))
    if image.alpha is not None:
        picture.putalpha(Image.fromarray(image.alpha))
    return picture


@pytest.mark.parametrize("case", ACCEPTED, ids=slug)
def test_a_file_is_read_as_a_person_sees_it(case: Case) -> None:
    """The picture is upright, with right colours and transparency, and so the engine gets it."""
    assert isinstance(case.expected, Image.Image)
    image = read(case.data, LIMITS)
    picture = shown(image)
    assert (picture.mode, picture.size) == (case.expected.mode, case.expected.size)
    assert difference(picture, case.expected) <= TOLERANCE
    data, alpha = engine_input(image, on_white=False)
    assert alpha is image.alpha
    with Image.open(io.BytesIO(data)) as opened:  # as ComfyUI's LoadImage does
        loaded = ImageOps.exif_transpose(opened).convert("RGB")
    assert np.array_equal(np.asarray(loaded), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("case", REFUSED, ids=slug)
def test_a_file_is_refused_for_what_it_is(case: Case) -> None:
    """The refusal has the documented code and a message for a person."""
    assert isinstance(case.expected, Refused)
    with pytest.raises(InvalidRequest) as refusal:
        examine(case.data, LIMITS)
    assert refusal.value.code == case.expected.code
    assert len(refusal.value.message) > 10
    assert " at 0x" not in refusal.value.message
