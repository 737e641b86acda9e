"""Image processes: hostile pictures harm only themselves, and results are encoded."""

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

from actors.images.process_pool import EncodeFailed, ImageProcessPool, PreparedImage
from actors.images.reader import ImageInfo
from restoration.engine_port import Pixels
from restoration.errors import (
    BrokenImage,
    DependencyUnavailable,
    ImageTooLarge,
    RestorationError,
    UnsupportedImage,
)
from restoration.images import ImageType, UploadLimits
from restoration.jobs import OutputFormat
from restoration.limits.fair_places import current_owner
from tests.corpus import corpus, siblings
from tests.fakes.image_process import FORBIDDEN
from tests.support.pictures import ACCEPTED, HEIGHT, WIDTH, file, noise
from tests.support.polling import until

GOOD = ACCEPTED["jpeg"][1]
STAND_IN = (sys.executable, "-P", "-m", "tests.fakes.image_process")
PROGRAM = "tests.fakes.image_process"
# a photo without alpha channel and metadata
PLAIN = PreparedImage(b"", ImageInfo(ImageType.PNG, 60, 40), grey=False)


def order(deed: str) -> bytes:
    """Return a picture that makes the fake process misbehave; it begins like a BMP."""
    return b"BM" + deed.encode()


@pytest.fixture
async def pool() -> AsyncIterator[ImageProcessPool]:
    """Run a pool of two fake processes with one second of CPU time for the largest picture."""
    async with ImageProcessPool(UploadLimits(), processes=2, cpu_s=1, argv=STAND_IN) as pool:
        yield pool


@pytest.fixture(scope="module")
async def real() -> AsyncIterator[ImageProcessPool]:
    async with ImageProcessPool(UploadLimits(), processes=2) as pool:
        yield pool


@pytest.fixture
def pixels(tmp_path: Path) -> Pixels:
    values = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    (tmp_path / "pixels").write_bytes(values.tobytes())
    return Pixels(tmp_path / "pixels", 60, 40, 3)


async def examine_as(owner: str, pool: ImageProcessPool, data: bytes) -> ImageInfo:
    current_owner.set(owner)
    return await pool.examine(data)


async def encode(pool: ImageProcessPool, picture: Pixels | bytes, wanted: OutputFormat) -> bytes:
    return await pool.encode(picture, wanted, 90, PLAIN, grey=False)


class TestReading:
    @pytest.mark.parametrize("name", ACCEPTED)
    async def test_every_accepted_type_is_examined_and_prepared(
        self, real: ImageProcessPool, name: str
    ) -> None:
        """All late imports of a reader work although the process cannot open files."""
        kind, data = ACCEPTED[name]
        assert await real.examine(data) == ImageInfo(kind, WIDTH, HEIGHT)
        prepared = await real.prepare(data)
        assert prepared.info == ImageInfo(kind, WIDTH, HEIGHT)
        with Image.open(io.BytesIO(prepared.file)) as image:
            assert image.size == (WIDTH, HEIGHT)

    async def test_alpha_and_metadata_are_kept_apart(self, real: ImageProcessPool) -> None:
        """The alpha channel has a byte per pixel, and EXIF is kept only on request."""
        picture = noise("RGBA")
        picture.putalpha(noise("L"))
        data = file(picture, "PNG", exif=exif_of("Leica"))
        prepared = await real.prepare(data, keep_metadata=True)
        assert prepared.alpha == picture.getchannel("A").tobytes()
        assert prepared.exif is not None
        assert b"Leica" in prepared.exif
        plain = await real.prepare(data, on_white=True)
        assert (plain.alpha, plain.exif) == (None, None)

    async def test_the_largest_picture_has_enough_memory(self, real: ImageProcessPool) -> None:
        large = file(noise(size=(500, 500)).resize((4000, 4000)), "WEBP", method=0)
        assert await real.examine(large) == ImageInfo(ImageType.WEBP, 4000, 4000)

    async def test_refusals_keep_their_class_and_details(self, pool: ImageProcessPool) -> None:
        with pytest.raises(ImageTooLarge) as refusal:
            await pool.examine(file(noise(size=(17_000, 1)), "PNG"))
        assert refusal.value.details == {"width": 17_000, "height": 1, "max_side": 16_384}
        with pytest.raises(UnsupportedImage):
            await pool.examine(b"GIF89a")


class TestLosses:
    @pytest.mark.parametrize(
        ("deed", "error", "said"),
        [
            ("segfault", BrokenImage, "crashed"),
            ("hang", BrokenImage, "longer than"),
            ("spin", BrokenImage, "exceeded its CPU time limit"),
            ("large", BrokenImage, "exceeded its CPU time limit"),
            ("hoard", ImageTooLarge, "memory"),
            ("babble", DependencyUnavailable, "not examined"),
            ("boast", DependencyUnavailable, "not examined"),
            ("flood", DependencyUnavailable, "not examined"),
            ("exit", DependencyUnavailable, "exited"),
        ],
    )
    async def test_what_a_picture_does_costs_itself(
        self, pool: ImageProcessPool, deed: str, error: type[RestorationError], said: str
    ) -> None:
        """The picture is refused with a reason, while good pictures beside and after it succeed."""
        beside = asyncio.create_task(pool.examine(GOOD))
        with pytest.raises(error, match=said):
            await pool.examine(order(deed))
        assert (await beside).type is ImageType.JPEG
        assert (await pool.examine(GOOD)).type is ImageType.JPEG

    async def test_many_hostile_pictures_do_not_starve_a_good_one(
        self, pool: ImageProcessPool
    ) -> None:
        """The good picture succeeds despite more concurrent crashes than processes."""
        hostile = [pool.examine(order("segfault")) for _ in range(6)]
        answers = await asyncio.gather(
            *hostile[:3], pool.examine(GOOD), *hostile[3:], return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [
            *[BrokenImage] * 3,
            ImageInfo,
            *[BrokenImage] * 3,
        ]

    async def test_a_process_that_died_between_two_pictures_is_replaced(
        self, pool: ImageProcessPool
    ) -> None:
        await pool.examine(GOOD)
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        await until_gone(pool.pids)
        assert (await pool.examine(GOOD)).type is ImageType.JPEG

    async def test_a_process_that_the_kernel_killed_is_not_the_pictures_fault(
        self, pool: ImageProcessPool
    ) -> None:
        """Out of memory, the kernel may kill any process, so the picture may be a good one."""
        examining = asyncio.create_task(pool.examine(order("hang")))

        async def killed() -> bool:
            for pid in children(os.getpid(), PROGRAM):
                if is_locked_down(pid):
                    os.kill(pid, signal.SIGKILL)
                    return True
            return False

        await until(killed)
        with pytest.raises(DependencyUnavailable, match="not examined"):
            await examining

    async def test_a_cancelled_request_ends_its_process(self, pool: ImageProcessPool) -> None:
        """No process keeps working for a cancelled job."""
        preparing = asyncio.create_task(pool.prepare(order("spin")))

        async def works() -> bool:
            return any(is_locked_down(pid) for pid in children(os.getpid(), PROGRAM))

        await until(works)
        pids = children(os.getpid(), PROGRAM)
        preparing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await preparing
        await until_gone(pids)
        assert (await pool.examine(GOOD)).type is ImageType.JPEG

    async def test_a_process_that_cannot_be_started_yet_is_started_later(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A lack of memory for a process fails only the pictures of that moment."""
        start, refused = subprocess.Popen, 2

        def no_memory(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
            nonlocal refused
            refused -= 1
            if refused >= 0:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            return start(*arguments, **options)

        async with ImageProcessPool(UploadLimits(), processes=1, argv=STAND_IN) as pool:
            monkeypatch.setattr(subprocess, "Popen", no_memory)
            for _ in range(2):
                with pytest.raises(DependencyUnavailable, match="allocate memory"):
                    await pool.examine(GOOD)
            assert (await pool.examine(GOOD)).type is ImageType.JPEG


class TestTurns:
    async def test_one_owners_slow_pictures_leave_a_process_to_the_others(
        self, pool: ImageProcessPool
    ) -> None:
        """Another owner's picture is examined at once, however many slow ones wait."""
        slow = [asyncio.create_task(examine_as("mallory", pool, order("hang"))) for _ in range(6)]

        async def one_hangs() -> bool:
            return any(is_locked_down(pid) for pid in children(os.getpid(), PROGRAM))

        await until(one_hangs)
        for _ in range(3):
            assert (await examine_as("alice", pool, GOOD)).type is ImageType.JPEG
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)


class TestWriting:
    async def test_raw_pixels_are_written_in_every_format(
        self, real: ImageProcessPool, pixels: Pixels
    ) -> None:
        """PNG keeps every pixel, other formats the size, with any number of concurrent calls."""
        orders = [wanted for wanted in OutputFormat for _ in range(3)]
        results = await asyncio.gather(*(encode(real, pixels, wanted) for wanted in orders))
        for wanted, data in zip(orders, results, strict=True):
            with Image.open(io.BytesIO(data)) as image:
                assert (image.format, image.size) == (wanted.upper(), (60, 40))
                if wanted is OutputFormat.PNG:
                    assert image.tobytes() == pixels.path.read_bytes()

    async def test_the_photos_alpha_and_metadata_go_with_the_result(
        self, real: ImageProcessPool, pixels: Pixels
    ) -> None:
        photo = PreparedImage(
            b"",
            ImageInfo(ImageType.PNG, 30, 20),
            grey=False,
            alpha=bytes(300) + b"\xff" * 300,
            exif=exif_of("Leica").tobytes(),
        )
        data = await real.encode(pixels, OutputFormat.PNG, 90, photo, grey=False)
        with Image.open(io.BytesIO(data)) as image:
            assert image.mode == "RGBA"
            assert image.getchannel("A").getpixel((5, 2)) == 0
            assert image.getchannel("A").getpixel((5, 38)) == 255
            assert image.getexif()[0x010F] == "Leica"

    async def test_a_picture_that_cannot_be_written_harms_no_other(
        self, real: ImageProcessPool, pixels: Pixels
    ) -> None:
        """The error gives the reason, and the process handles the next picture."""
        with pytest.raises(EncodeFailed, match="Unidentified"):
            await encode(real, b"not a PNG", OutputFormat.JPEG)
        before = set(real.pids)
        assert await encode(real, pixels, OutputFormat.PNG)
        assert set(real.pids) == before

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    @pytest.mark.parametrize("wanted", [OutputFormat.PNG, OutputFormat.JPEG])
    async def test_a_large_picture_takes_bounded_memory(
        self, tmp_path: Path, wanted: OutputFormat
    ) -> None:
        """Encoding takes at most 7.5 bytes a pixel: 3 mapped ones and a copy of 4 in Pillow. None
        of it is kept for the next picture."""
        side = 4000
        (tmp_path / "small").write_bytes(bytes(3))
        (tmp_path / "large").touch()
        os.truncate(tmp_path / "large", 3 * side * side)
        async with ImageProcessPool(UploadLimits(), processes=1) as pool:
            await encode(pool, Pixels(tmp_path / "small", 1, 1, 3), wanted)
            [pid] = pool.pids
            before = resident_bytes(pid, "VmRSS")
            await encode(pool, Pixels(tmp_path / "large", side, side, 3), wanted)
            peak = resident_bytes(pid, "VmHWM")

            async def given_back() -> bool:
                return (resident_bytes(pid, "VmRSS") - before) / side**2 < 1

            await until(given_back)
        assert (peak - before) / side**2 < 7.5


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp and /proc are Linux's")
class TestSandbox:
    @pytest.mark.parametrize("deed", FORBIDDEN)
    async def test_a_picture_cannot_make_its_process_reach_out(
        self, pool: ImageProcessPool, deed: str
    ) -> None:
        """A decoder that has been taken over can use no file, socket, program or signal."""
        with pytest.raises(BrokenImage, match=f"{deed}: .*not permitted"):
            await pool.examine(order(deed))

    async def test_there_is_nothing_to_steal(
        self, pool: ImageProcessPool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The process has no secrets in its environment, no open files but its connection, and a
        seccomp filter."""
        monkeypatch.setenv("DATABASE_URL", "postgresql://u:hunter2@db/d")
        await pool.examine(GOOD)
        [pid] = pool.pids
        assert not any("hunter2" in entry for entry in environment(pid))
        assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
        assert {"NoNewPrivs:\t1", "Seccomp:\t2"} <= status_lines(pid)

    async def test_processes_die_with_their_owner(self) -> None:
        """When the owner is killed, the kernel ends its processes, hanging or computing."""
        owner = start_owner()

        async def at_work() -> bool:
            pids = children(owner.pid, PROGRAM)
            return len(pids) == 2 and all(is_locked_down(pid) for pid in pids)

        try:
            await until(at_work)
            pids = children(owner.pid, PROGRAM)
        finally:
            owner.kill()
            owner.wait()
        await until_gone(pids)

    async def test_an_idle_pool_has_no_processes_and_a_closed_one_leaves_none(self) -> None:
        async with ImageProcessPool(UploadLimits(), argv=STAND_IN) as pool:
            assert children(os.getpid(), PROGRAM) == []
            await pool.examine(GOOD)
            assert len(children(os.getpid(), PROGRAM)) == 1
        assert children(os.getpid(), PROGRAM) == []


def test_image_processes_load_little() -> None:
    """Neither Ray nor FastAPI nor boto3 is imported into the processes that read hostile bytes."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, actors.images.process; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"ray", "fastapi", "boto3", "sqlalchemy", "pydantic"}.intersection(loaded)


OWNER_PROGRAM = """
import asyncio
from actors.images.process_pool import ImageProcessPool
from restoration.images import UploadLimits

async def main():
    pool = ImageProcessPool(UploadLimits(), argv={argv!r}, cpu_s=1000)
    await asyncio.gather(*(pool.prepare(deed) for deed in (b"BMhang", b"BMlarge")))

asyncio.run(main())
"""


def start_owner() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", OWNER_PROGRAM.format(argv=STAND_IN)])


def exif_of(maker: str) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F] = maker
    return exif


def children(parent: int, program: str) -> list[int]:
    """Return the children of `parent` that run `program`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(status[1]) == parent and program in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    return found


def environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def is_dead(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


async def until_gone(pids: list[int]) -> None:
    async def gone() -> bool:
        return all(map(is_dead, pids))

    await until(gone)


def is_locked_down(pid: int) -> bool:
    """Return whether its seccomp filter is set; it reads pictures only after that."""
    return "Seccomp:\t2" in status_lines(pid)


def status_lines(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/status").read_text().split("\n"))


def resident_bytes(pid: int, kind: str) -> int:
    """Return `VmRSS`, the current memory, or `VmHWM`, the peak, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    [kilobytes] = [line.split()[1] for line in status.splitlines() if line.startswith(kind)]
    return 1024 * int(kilobytes)


async def test_every_accepted_file_is_read_behind_the_lock(real: ImageProcessPool) -> None:
    """No decoder needs a file, a module or a thread that the locked-down process cannot have."""
    current_owner.set("corpus")
    for case in (*corpus(), *siblings()):
        if isinstance(case.expected, Image.Image):
            info = await real.examine(case.data)
            assert (info.width, info.height) == case.expected.size, case.what
