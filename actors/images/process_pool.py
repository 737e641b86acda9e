"""A pool of sandboxed image processes, which read uploads and write results.

A malicious picture affects only its own request: a process that crashes, hangs or runs out of
memory is killed and replaced, and so is the process of a cancelled request. Uploads are parsed only
in `actors.images.process`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import structlog

from actors.images.encode import netpbm_header
from actors.images.process import ProcessLimits
from actors.images.process_client import Answer, ProcessClient, ProcessLost
from actors.images.reader import ImageInfo
from restoration.engine_port import EngineResult, Pixels
from restoration.errors import (
    BrokenImage,
    DependencyUnavailable,
    ImageTooLarge,
    InvalidRequest,
    UnsupportedImage,
)
from restoration.images import (
    MEBIBYTE,
    ImageType,
    UploadLimits,
    check_dimensions,
    check_size_bytes,
    sniff,
)
from restoration.jobs import OutputFormat
from restoration.limits.fair_places import FairPlaces, Owner, current_owner

log = structlog.get_logger(__name__)

DEFAULT_PROCESSES = 3
DEFAULT_CPU_S = 15.0
_ARGV = (sys.executable, "-P", "-m", "actors.images.process")
_START_CPU_S = 10.0
_MAX_BYTES_A_PIXEL = 5  # of an answer: four channels and an alpha apart, or a PNG that grew
_REFUSALS: dict[str, type[InvalidRequest]] = {
    kind.code: kind for kind in (InvalidRequest, UnsupportedImage, BrokenImage, ImageTooLarge)
}


class Examiner(Protocol):
    async def examine(self, data: bytes) -> ImageInfo:
        """Decode the upload completely, and return its type and size.

        Raises InvalidRequest or a subclass, DependencyUnavailable.
        """


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An upload as input for an engine, with the data that its result needs.

    `file` is a Netpbm of the normalised pixels; `info` has the upload's type, and the width and
    height. `alpha` has one byte for each pixel, row by row, and is None for an opaque picture.
    """

    file: bytes
    info: ImageInfo
    grey: bool
    alpha: bytes | None = None
    exif: bytes | None = None

    @property
    def pixels(self) -> int:
        return self.info.width * self.info.height


class EncodeFailed(Exception):
    """A result could not be written."""


class ImageProcessPool:
    """Up to `processes` image processes, each started on demand. An async context manager.

    Processes are shared fairly between the owners of examined pictures. `cpu_s` is the CPU time
    limit for a picture of the largest accepted size; smaller ones get proportionally less.
    """

    def __init__(
        self,
        limits: UploadLimits,
        processes: int = DEFAULT_PROCESSES,
        cpu_s: float = DEFAULT_CPU_S,
        niceness: int = 0,
        argv: Sequence[str] = _ARGV,
    ) -> None:
        self._limits = ProcessLimits(limits, cpu_s)
        self._argv = [*argv, self._limits.dump()]
        self._niceness = niceness
        self._processes = processes
        self._places = FairPlaces(processes, "pictures")
        self._idle: list[ProcessClient] = []
        # The kernel kills a process when the thread that started it ends (PR_SET_PDEATHSIG), so
        # this thread lives as long as the pool.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="image-processes")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Wait for the requests in progress, then end the processes."""
        for _ in range(self._processes):
            await self._places.take(None)
        for process in self._idle:
            self._discard(process)
        await asyncio.to_thread(self._starter.shutdown)

    @property
    def pids(self) -> list[int]:
        """The ids of the idle processes."""
        return [process.pid for process in self._idle]

    async def examine(self, data: bytes) -> ImageInfo:
        """See `Examiner.examine`."""
        answer, _ = await self._read(data, {"do": "examine"}, current_owner.get())
        return self._info(answer)

    async def prepare(
        self, data: bytes, *, keep_metadata: bool = False, on_white: bool = False
    ) -> PreparedImage:
        """Read an upload for an engine. With `on_white` it is composed on white, without alpha.

        Raises InvalidRequest or a subclass, DependencyUnavailable.
        """
        request = {"do": "prepare", "keep_metadata": keep_metadata, "on_white": on_white}
        answer, (file, alpha, exif) = await self._read(data, request, None)
        info = self._info(answer)
        grey, pixels = bool(answer["grey"]), info.width * info.height
        header = netpbm_header(info.width, info.height, grey=grey)
        size = len(header) + pixels * (1 if grey else 3)
        if not file.startswith(header) or len(file) != size or len(alpha) not in {0, pixels}:
            raise DependencyUnavailable("an image process sent an invalid response")
        return PreparedImage(file, info, grey, alpha or None, exif or None)

    async def encode(
        self,
        picture: EngineResult,
        output_format: OutputFormat,
        quality: int,
        photo: PreparedImage,
        *,
        grey: bool,
    ) -> bytes:
        """Encode the engine's picture, with the alpha and the metadata of `photo`.

        See `actors.images.encode.encode`. Raises EncodeFailed, DependencyUnavailable.
        """
        largest = self._limits.upload.max_result_pixels
        request = {
            "do": "encode",
            "format": output_format,
            "quality": quality,
            "grey": grey,
            "alpha": [photo.info.height, photo.info.width] if photo.alpha else None,
        }
        parts = [b"", photo.alpha or b"", photo.exif or b""]
        with ExitStack() as files:
            file = None
            if isinstance(picture, Pixels):
                pixels = picture.width * picture.height
                request["raw"] = [picture.height, picture.width, picture.channels]
                file = files.enter_context(picture.path.open("rb", buffering=0))
            else:
                pixels, parts[0] = largest, picture
            request["pixels"] = pixels
            try:
                async with self._process(None) as process:
                    answer, data = await process.ask(
                        request,
                        parts,
                        file,
                        cpu_s=self._limits.cpu_s_for(pixels),
                        max_bytes=_MAX_BYTES_A_PIXEL * largest + MEBIBYTE,
                    )
            except ProcessLost as lost:
                kind = EncodeFailed if lost.by_picture else DependencyUnavailable
                raise kind(f"the result was not encoded: its process {lost}") from lost
        if data:
            return data[0]
        raise EncodeFailed(str(answer.get("failed", "out of memory")))

    async def _read(self, data: bytes, request: Mapping[str, Any], owner: Owner) -> Answer:
        upload = self._limits.upload
        check_size_bytes(len(data), upload)
        sniff(data)  # raises for files that are not pictures, without using a process
        max_bytes = _MAX_BYTES_A_PIXEL * upload.max_pixels + MEBIBYTE
        try:
            async with self._process(owner) as process:
                answer, parts = await process.ask(
                    request, [data], cpu_s=self._limits.cpu_s_for(0), max_bytes=max_bytes
                )
                if "pixels" in answer:
                    cpu_s = self._limits.cpu_s_for(min(int(answer["pixels"]), upload.max_pixels))
                    answer, parts = await process.answer(cpu_s, max_bytes)
                # Raised within the block, which ends the process: its memory may be fragmented.
                if "exhausted" in answer:
                    raise ImageTooLarge("decoding the image takes more memory than is allowed")
        except ProcessLost as lost:
            log.warning("image_process_lost", reason=str(lost), size_bytes=len(data))
            if lost.by_picture:
                raise BrokenImage(f"the image cannot be decoded: its decoder {lost}") from lost
            raise DependencyUnavailable(f"the image was not examined: its decoder {lost}") from lost
        if "refused" in answer:
            refusal = _REFUSALS.get(answer["refused"], InvalidRequest)
            raise refusal(str(answer["message"]), **answer["details"])
        return answer, parts

    def _info(self, answer: Mapping[str, Any]) -> ImageInfo:
        """Validate the answer: the process may be compromised."""
        info = ImageInfo(ImageType(answer["type"]), int(answer["width"]), int(answer["height"]))
        check_dimensions(info.width, info.height, self._limits.upload)
        return info

    @asynccontextmanager
    async def _process(self, owner: Owner) -> AsyncIterator[ProcessClient]:
        """Provide a process for one request. It is ended if the block raises."""
        async with self._places.turn(owner):
            process = await self._idle_or_new()
            try:
                yield process
            except BaseException:
                self._discard(process)
                raise
            self._idle.append(process)

    def _discard(self, process: ProcessClient) -> None:
        process.end()
        self._starter.submit(process.reap)

    async def _idle_or_new(self) -> ProcessClient:
        while self._idle:
            process = self._idle.pop()
            if process.lives:
                return process
            self._discard(process)
        loop = asyncio.get_running_loop()
        starting = loop.run_in_executor(self._starter, ProcessClient, self._argv, self._niceness)
        try:
            process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_end_started)
            raise
        try:
            await process.answer(_START_CPU_S, 0)
        except BaseException as error:
            self._discard(process)
            if isinstance(error, ProcessLost):
                raise DependencyUnavailable(
                    f"an image process did not start: it {error}"
                ) from error
            raise
        return process


def _end_started(starting: asyncio.Future[ProcessClient]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().end()
