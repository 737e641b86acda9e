"""Pictures that crash, hang or burst their decoder cost themselves, and nobody else."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from actors.decoders import Decoders
from actors.images.reader import ImageInfo
from restoration.errors import (
    BrokenImage,
    DependencyUnavailable,
    ImageTooLarge,
    RestorationError,
    UnsupportedImage,
)
from restoration.images import ImageType, UploadLimits
from tests.pictures import ACCEPTED, HEIGHT, WIDTH, file, noise

GOOD = ACCEPTED["jpeg"][1]
STAND_IN = (sys.executable, "-P", "-m", "tests.fakes.decoder")
DEADLINE_S = 30


def order(deed: str) -> bytes:
    """A picture that makes the stand-in do this; its first bytes are a BMP's."""
    return b"BM" + deed.encode()


@pytest.fixture
async def decoders() -> AsyncIterator[Decoders]:
    """The stand-in's, two at a time, with little patience."""
    decoders = Decoders(UploadLimits(), processes=2, timeout_s=2.0, argv=STAND_IN)
    yield decoders
    await decoders.aclose()


async def test_04_good_pictures_pass() -> None:
    """Every accepted kind, in a real decoder, one after another."""
    decoders = Decoders(UploadLimits(), processes=1)
    for kind, data in ACCEPTED.values():
        assert await decoders.examine(data) == ImageInfo(kind, WIDTH, HEIGHT)
    await decoders.aclose()


async def test_04_the_largest_picture_passes() -> None:
    """Decoders may use as much memory as the largest accepted upload of the hungriest type."""
    decoders = Decoders(UploadLimits(), processes=1)
    large = file(noise(size=(500, 500)).resize((4000, 4000)), "WEBP", method=0)
    assert await decoders.examine(large) == ImageInfo(ImageType.WEBP, 4000, 4000)
    await decoders.aclose()


@pytest.mark.parametrize(
    ("deed", "error", "said"),
    [
        ("segfault", BrokenImage, "crashed"),
        ("hang", BrokenImage, "longer than 2 s"),
        ("spin", BrokenImage, "took"),
        ("hoard", ImageTooLarge, "memory"),
        ("babble", DependencyUnavailable, "not examined"),
        ("flood", DependencyUnavailable, "not examined"),
        ("write", DependencyUnavailable, "exited"),
        ("exit", DependencyUnavailable, "exited"),
        # by the kernel, short of memory: the picture may be a good one
        ("killed", DependencyUnavailable, "not examined"),
    ],
)
async def test_04_what_a_picture_does_costs_itself(
    decoders: Decoders, deed: str, error: type[RestorationError], said: str
) -> None:
    """It is refused with a reason, while good pictures beside it and after it pass."""
    beside = asyncio.create_task(decoders.examine(GOOD))
    with pytest.raises(error, match=said):
        await decoders.examine(order(deed))
    assert (await beside).type is ImageType.JPEG
    assert (await decoders.examine(GOOD)).type is ImageType.JPEG


async def test_04_many_hostile_pictures_do_not_starve_a_good_one(decoders: Decoders) -> None:
    """More crashes than there are decoders, all at once: the good picture among them passes."""
    hostile = [decoders.examine(order("segfault")) for _ in range(6)]
    answers = await asyncio.gather(*hostile[:3], decoders.examine(GOOD), *hostile[3:], **KEEP)
    assert [type(answer) for answer in answers] == [BrokenImage] * 3 + [ImageInfo] + [
        BrokenImage
    ] * 3


KEEP = {"return_exceptions": True}


async def test_04_a_decoder_that_died_between_two_pictures_is_replaced(decoders: Decoders) -> None:
    """Nobody is refused for what happened to a process that had nothing to do."""
    await decoders.examine(GOOD)
    for pid in children(os.getpid(), "tests.fakes.decoder"):
        os.kill(pid, signal.SIGKILL)
    await until(lambda: all(is_dead(pid) for pid in children(os.getpid(), "tests.fakes.decoder")))
    assert (await decoders.examine(GOOD)).type is ImageType.JPEG


async def test_04_refusals_are_those_of_the_examination(decoders: Decoders) -> None:
    """Class, code and details come out of the process as they went in."""
    with pytest.raises(ImageTooLarge) as refusal:
        await decoders.examine(file(noise(size=(17_000, 1)), "PNG"))
    assert refusal.value.details == {"width": 17_000, "height": 1, "max_side": 16_384}
    with pytest.raises(UnsupportedImage):
        await decoders.examine(b"GIF89a")


async def test_04_decoders_have_nothing_to_steal(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No secret of the ingress is in the environment of a process that reads hostile bytes."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:hunter2@db/d")
    await decoders.examine(GOOD)
    pids = children(os.getpid(), "tests.fakes.decoder")
    assert pids
    for pid in pids:
        assert environment(pid).keys() == {"PATH", "PYTHONPATH"}
        assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]


async def test_04_an_idle_pool_has_no_processes_and_a_closed_one_leaves_none() -> None:
    """Nothing is started before it is needed, and everything ends with the pool."""
    decoders = Decoders(UploadLimits(), argv=STAND_IN)
    assert children(os.getpid(), "tests.fakes.decoder") == []
    await decoders.examine(GOOD)
    assert len(children(os.getpid(), "tests.fakes.decoder")) == 1
    await decoders.aclose()
    assert children(os.getpid(), "tests.fakes.decoder") == []


OWNER = """
import asyncio
from actors.decoders import Decoders
from restoration.images import UploadLimits

async def main():
    decoders = Decoders(UploadLimits(), argv={argv!r})
    await asyncio.gather(*(decoders.examine(b"BM" + deed) for deed in (b"hang", b"spin")))

asyncio.run(main())
"""


async def test_04_decoders_die_with_their_owner() -> None:
    """SIGKILL for the owner, while they hang: the kernel ends them, and none is left over."""
    with owner_of_decoders() as owner:
        await until(lambda: len(children(owner.pid, "tests.fakes.decoder")) == 2)
        pids = children(owner.pid, "tests.fakes.decoder")
        # not between exec and prctl: what they read by then is a picture
        await until(lambda: all(is_locked_up(pid) for pid in pids))
        owner.kill()
        await until(lambda: all(is_dead(pid) for pid in pids))


def owner_of_decoders() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", OWNER.format(argv=STAND_IN)])


def test_04_decoders_load_little() -> None:
    """Neither Ray nor FastAPI nor boto3 is imported where hostile bytes are read."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, actors.decoder; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"ray", "fastapi", "boto3", "sqlalchemy", "pydantic", "numpy"}.intersection(loaded)


def children(parent: int, program: str) -> list[int]:
    """Processes that `parent` started and that run `program`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(status[1]) == parent and program in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return found


def environment(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return {name: value for name, _, value in (line.partition("=") for line in lines if line)}


def is_dead(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def is_locked_up(pid: int) -> bool:
    """Its limits are set, which comes after its bond with its owner."""
    limits = Path(f"/proc/{pid}/limits").read_text()
    return any(line.startswith("Max core file size        0  ") for line in limits.splitlines())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.02)
