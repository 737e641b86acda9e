"""A day of submissions: quiet nights, busy evenings, bursts and whole albums. Pure functions.

Every figure here is an assumption about a service of middling size, made before the first run.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

from restoration.jobs import Artifact, JobOptions, NewJob, OutputFormat, Priority

HOUR_S = 3600
DAY_S = 24 * HOUR_S

# Interactive photos per hour, from midnight on.
PHOTOS = (
    *(20, 10, 5, 5, 5, 10, 30, 70, 120, 160, 190, 200),
    *(190, 180, 180, 190, 200, 210, 240, 280, 300, 250, 140, 60),
)
# Bursts from a shared link: number per day, photos in each, and duration in seconds.
BURSTS, BURST_PHOTOS, BURST_S = 5, 50, 300
# Albums submitted at once by a script: number per day, and range of photos in each.
ALBUMS, ALBUM_PHOTOS = 10, (60, 300)
OWNERS = 200

# For each workflow the share of photos and the median execution in seconds; times are lognormal.
WORKFLOWS = {"restore": (0.8, 18.0), "enlarge": (0.2, 8.0)}
SPREAD = 0.4

INPUT = Artifact("inputs/simulated.png", "0" * 64, 1, "image/png")


@dataclass(frozen=True, slots=True)
class Photo:
    """A submission at `at_s` seconds after midnight that holds a GPU for `execute_s`."""

    at_s: float
    execute_s: float
    job: NewJob


def day(seed: int, until_s: float = DAY_S) -> list[Photo]:
    """Return the submissions of one day up to `until_s`, in order; a seed always gives the same
    day."""
    chance = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    photos = [
        *(_photo(at_s, Priority.INTERACTIVE, _owner(chance), chance) for at_s in _singly(chance)),
        *(photo for _ in range(BURSTS) for photo in _burst(chance)),
        *(photo for _ in range(ALBUMS) for photo in _album(chance)),
    ]
    return sorted((each for each in photos if each.at_s < until_s), key=lambda each: each.at_s)


def peak_workers(photos: Sequence[Photo], window_s: float = 600) -> int:
    """Return the number of workers that keeps up with the busiest ten minutes, all classes
    together."""
    work_s: Counter[int] = Counter()
    for photo in photos:
        work_s[int(photo.at_s // window_s)] += math.ceil(photo.execute_s)
    return math.ceil(max(work_s.values()) / window_s)


def _singly(chance: random.Random) -> Iterator[float]:
    for hour, photos in enumerate(PHOTOS):
        at_s = chance.expovariate(photos / HOUR_S)
        while at_s < HOUR_S:
            yield hour * HOUR_S + at_s
            at_s += chance.expovariate(photos / HOUR_S)


def _burst(chance: random.Random) -> Iterator[Photo]:
    begins_s = chance.uniform(8 * HOUR_S, 23 * HOUR_S)
    for _ in range(BURST_PHOTOS):
        at_s = begins_s + chance.uniform(0, BURST_S)
        yield _photo(at_s, Priority.INTERACTIVE, _owner(chance), chance)


def _album(chance: random.Random) -> Iterator[Photo]:
    at_s, owner = chance.uniform(0, 23 * HOUR_S), _owner(chance)
    for _ in range(chance.randint(*ALBUM_PHOTOS)):
        yield _photo(at_s, Priority.BATCH, owner, chance)


def _owner(chance: random.Random) -> str:
    return f"owner-{chance.randrange(OWNERS)}"


def _photo(at_s: float, priority: Priority, owner: str, chance: random.Random) -> Photo:
    shares = [share for share, _ in WORKFLOWS.values()]
    [workflow] = chance.choices(list(WORKFLOWS), shares)
    execute_s = chance.lognormvariate(math.log(WORKFLOWS[workflow][1]), SPREAD)
    job = NewJob(
        id=UUID(int=chance.getrandbits(128), version=4),
        owner=owner,
        workflow=workflow,
        workflow_version="1",
        params={},
        output_format=OutputFormat.PNG,
        input=INPUT,
        max_attempts=3,
        options=JobOptions(priority=priority),
    )
    return Photo(at_s, execute_s, job)
