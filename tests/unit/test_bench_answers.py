"""The benchmarks accept right answers and count the others."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from benchmarks.answers import answers, is_right
from benchmarks.service_client import Held, NoAnswer

HELD = Held(256, 0.0, jobs=8)


def _enlarged(photo: bytes, side: int = HELD.side) -> bytes:
    out = io.BytesIO()
    with Image.open(io.BytesIO(photo)) as image:
        image.resize((side, side)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.bench
def test_only_the_photos_own_enlargement_is_right() -> None:
    """Another photo's enlargement, which a service that mixes up jobs would send, and another size
    are wrong."""
    china, flower = HELD.photo("china"), HELD.photo("flower")
    assert is_right(_enlarged(china), china, HELD.side)
    assert is_right(_enlarged(flower), flower, HELD.side)
    assert not is_right(_enlarged(flower), china, HELD.side)
    assert not is_right(_enlarged(china, 128), china, HELD.side)


@pytest.mark.bench
async def test_wrong_answers_and_none_are_counted() -> None:
    """Checked with a service that mixes up every second job, and one that fails all of them."""
    china = HELD.photo("china")

    async def always_china(_photo: bytes) -> bytes:
        return _enlarged(china)

    async def never(_photo: bytes) -> bytes:
        raise NoAnswer("expired")

    mixed_up = await answers(always_china, HELD, in_flight=3)
    assert (mixed_up.wrong, len(mixed_up.ended_at_s)) == (4, 8)
    assert (await answers(never, HELD, in_flight=3)).wrong == 8
