"""Send jobs through a service, and check that each answer is the right picture.

The jobs alternate between two photos, to detect a service that mixes jobs up.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from benchmarks.service_client import Held, NoAnswer, PhotoName
from benchmarks.throughput import per_s

PHOTOS: tuple[PhotoName, ...] = ("china", "flower")
_THUMBNAIL = (16, 16)
_ALIKE = 8  # mean difference out of 255; the two photos are some 60 apart


@dataclass
class Answers:
    """The time at which each job's answer arrived, and the number of wrong or missing answers."""

    ended_at_s: list[float] = field(default_factory=list)
    wrong: int = 0

    @property
    def per_s(self) -> float:
        return per_s(self.ended_at_s)


async def answers(
    restore: Callable[[bytes], Awaitable[bytes]], held: Held, in_flight: int
) -> Answers:
    """Run `held.jobs` jobs, `in_flight` at a time. The pictures are checked after the last one."""
    told, results = Answers(), list[tuple[bytes, bytes]]()
    photos = [held.photo(name) for name in PHOTOS]
    left = iter(range(held.jobs))

    async def work_off() -> None:
        for n in left:
            photo = photos[n % len(photos)]
            try:
                results.append((photo, await restore(photo)))
            except NoAnswer:
                told.wrong += 1
            told.ended_at_s.append(time.monotonic())

    await asyncio.gather(*(work_off() for _ in range(in_flight)))
    told.wrong += sum(not is_right(result, photo, held.side) for photo, result in results)
    return told


def is_right(result: bytes, photo: bytes, side: int) -> bool:
    """Return whether the result is the photo, enlarged to a square of `side` pixels."""
    with Image.open(io.BytesIO(result)) as image, Image.open(io.BytesIO(photo)) as before:
        if image.size != (side, side):
            return False
        thumbnails = [
            np.asarray(each.convert("RGB").resize(_THUMBNAIL, Image.Resampling.BOX), float)
            for each in (image, before)
        ]
    return bool(np.abs(thumbnails[0] - thumbnails[1]).mean() < _ALIKE)
