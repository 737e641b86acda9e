"""The encoder processes: what they write, how they die, and that none outlives its owner."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from actors.encoders import EncoderFailed, Encoders
from restoration.engine import Pixels
from restoration.jobs import OutputFormat
from tests.polling import until

OWNER = """
import sys

from actors.encoders import Encoders

encoders = Encoders(2)
print(*encoders.pids, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
async def encoders() -> AsyncIterator[Encoders]:
    """For which no picture is small."""
    async with Encoders(2, small_pixels=0) as encoders:
        yield encoders


@pytest.fixture
def pixels(tmp_path: Path) -> Pixels:
    values = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    (tmp_path / "pixels").write_bytes(values.tobytes())
    return Pixels(tmp_path / "pixels", 60, 40, 3)


async def test_02_they_write_what_was_handed_over(encoders: Encoders, pixels: Pixels) -> None:
    """To the pixel in PNG, in the size and format asked for otherwise; any number at once."""
    orders = [(pixels, wanted, 90) for wanted in OutputFormat for _ in range(3)]
    results = await asyncio.gather(*(encoders.encode(*order) for order in orders))
    for (_, wanted, _), data in zip(orders, results, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size) == (wanted.upper(), (60, 40))
            if wanted is OutputFormat.PNG:
                assert image.tobytes() == pixels.path.read_bytes()


async def test_05_a_small_picture_needs_no_process(encoders: Encoders, pixels: Pixels) -> None:
    """It comes out the same, to the byte, with every encoder dead; one with more pixels fails."""
    async with Encoders(2, small_pixels=60 * 40) as quick:
        for pid in quick.pids:
            os.kill(pid, signal.SIGKILL)
        for wanted in OutputFormat:
            order = (pixels, wanted, 90)
            assert await quick.encode(*order) == await encoders.encode(*order)
    async with Encoders(1, small_pixels=60 * 40 - 1) as quick:
        os.kill(quick.pids[0], signal.SIGKILL)
        with pytest.raises(EncoderFailed, match="died"):
            await quick.encode(pixels, OutputFormat.PNG, 90)


async def test_02_a_picture_that_cannot_be_written_harms_no_other(
    encoders: Encoders, pixels: Pixels, tmp_path: Path
) -> None:
    """It is EncoderFailed with the reason, and the encoder takes the next order."""
    gone = Pixels(tmp_path / "gone", 60, 40, 3)
    before = encoders.pids
    with pytest.raises(EncoderFailed, match="FileNotFoundError"):
        await encoders.encode(gone, OutputFormat.PNG, 90)
    assert await encoders.encode(pixels, OutputFormat.PNG, 90)
    assert encoders.pids == before


async def test_02_an_encoder_that_dies_is_replaced(encoders: Encoders, pixels: Pixels) -> None:
    """The picture it was given fails; from then on there are as many as before."""
    for pid in encoders.pids:
        os.kill(pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(EncoderFailed, match="died"):
            await encoders.encode(pixels, OutputFormat.PNG, 90)
    for _ in range(3):
        assert await encoders.encode(pixels, OutputFormat.PNG, 90)
    assert len(set(encoders.pids)) == 2


async def test_02_an_encoder_that_cannot_be_replaced_yet_is_replaced_later(
    pixels: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory for a process costs the pictures of that moment, and none after it."""
    start, refused = subprocess.Popen, 2

    def no_memory(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        nonlocal refused
        refused -= 1
        if refused >= 0:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return start(*arguments, **options)

    async with Encoders(1, small_pixels=0) as encoders:
        monkeypatch.setattr(subprocess, "Popen", no_memory)
        os.kill(encoders.pids[0], signal.SIGKILL)
        for reason in ("died", "allocate memory", "allocate memory"):
            with pytest.raises(EncoderFailed, match=reason):
                await encoders.encode(pixels, OutputFormat.PNG, 90)
        assert await encoders.encode(pixels, OutputFormat.PNG, 90)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("wanted", [OutputFormat.PNG, OutputFormat.JPEG])
async def test_06_a_large_picture_takes_bounded_memory(
    tmp_path: Path, wanted: OutputFormat
) -> None:
    """At most 7.5 bytes a pixel: the 3 that were handed over, mapped, and one copy in Pillow's 4.
    Nothing of that is kept for the next picture."""
    side = 4000
    (tmp_path / "small").write_bytes(bytes(3))
    os.truncate(_touched(tmp_path / "large"), 3 * side * side)
    async with Encoders(1, small_pixels=0) as encoders:
        await encoders.encode(Pixels(tmp_path / "small", 1, 1, 3), wanted, 90)
        [pid] = encoders.pids
        before = _resident_bytes(pid, "VmRSS")
        await encoders.encode(Pixels(tmp_path / "large", side, side, 3), wanted, 90)
        peak, after = _resident_bytes(pid, "VmHWM"), _resident_bytes(pid, "VmRSS")
    assert (peak - before) / side**2 < 7.5
    assert (after - before) / side**2 < 1


def _touched(path: Path) -> Path:
    path.touch()
    return path


def _resident_bytes(pid: int, kind: str) -> int:
    """Linux's `VmRSS`, as it is now, or `VmHWM`, at its highest."""
    status = Path(f"/proc/{pid}/status").read_text()
    [kilobytes] = [line.split()[1] for line in status.splitlines() if line.startswith(kind)]
    return 1024 * int(kilobytes)


async def test_02_none_outlives_its_owner() -> None:
    """A worker that is killed leaves no encoder behind."""
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in (await owner.stdout.readline()).split()]
    assert len(pids) == 2
    owner.kill()
    await owner.wait()

    async def all_gone() -> bool:
        return not any(map(_lives, pids))

    await until(all_gone)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
