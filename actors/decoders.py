"""Decoders: uploads are examined in processes that may crash, hang or burst without loss.

What a picture does to its decoder costs that picture: it is refused, and the next one has a new
process. Each thread here has a decoder of its own (`actors.decoder`), started with the first
picture that it gets, and ended by the kernel when the thread ends, however that happens.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import structlog

from actors.decoder import READY, SIZE, Allowance
from actors.images.reader import ImageInfo
from restoration.errors import (
    BrokenImage,
    DependencyUnavailable,
    ImageTooLarge,
    InvalidRequest,
    UnsupportedImage,
)
from restoration.images import MEBIBYTE, ImageType, UploadLimits, check_size_bytes, sniff

log = structlog.get_logger(__name__)

DEFAULT_PROCESSES = 2
DEFAULT_TIMEOUT_S = 15.0
_ARGV = (sys.executable, "-P", "-m", "actors.decoder")
_PACKAGES = Path(__file__).parents[1]
# What a decoder may use of memory. With 16 million pixels, lossy WebP needed the most: 300 to 400
# MiB in all, where this gives 650.
_BASE_BYTES = 192 * MEBIBYTE
_BYTES_A_PIXEL = 20
_START_TIMEOUT_S = 30.0
_MAX_ANSWER_BYTES = 16 * 1024
_REFUSALS: dict[str, type[InvalidRequest]] = {
    kind.code: kind for kind in (InvalidRequest, UnsupportedImage, BrokenImage, ImageTooLarge)
}


class Examiner(Protocol):
    async def examine(self, data: bytes) -> ImageInfo:
        """What the upload is. Raises InvalidRequest and its kin, DependencyUnavailable."""


class Decoders:
    """An Examiner with up to `processes` decoders, each with `timeout_s` for a picture."""

    def __init__(
        self,
        limits: UploadLimits,
        processes: int = DEFAULT_PROCESSES,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        argv: Sequence[str] = _ARGV,
    ) -> None:
        self._limits = limits
        self._timeout_s = timeout_s
        allowance = Allowance(limits, _memory_bytes(limits), cpu_s=int(timeout_s) + 1)
        self._argv = [*argv, allowance.dump()]
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="decoder")
        self._own = threading.local()
        self._all: set[_Decoder] = set()

    async def examine(self, data: bytes) -> ImageInfo:
        check_size_bytes(len(data), self._limits)
        sniff(data)  # what is no picture is refused here and now
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._examine, data)

    async def aclose(self) -> None:
        """Wait for the pictures that are being examined, then end the processes."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        for decoder in self._all:
            await asyncio.to_thread(decoder.end)

    def _examine(self, data: bytes) -> ImageInfo:
        decoder = self._decoder()
        try:
            answer = decoder.ask(data, self._timeout_s)
        except _Lost as lost:
            self._discard(decoder)
            log.warning("decoder_lost", reason=str(lost), size_bytes=len(data))
            raise lost.error() from lost
        if answer is None:
            self._discard(decoder)  # what it allocated may have left its memory in pieces
            raise ImageTooLarge("the picture takes more memory to decode than is allowed")
        if isinstance(answer, InvalidRequest):
            raise answer
        return answer

    def _decoder(self) -> _Decoder:
        decoder: _Decoder | None = getattr(self._own, "decoder", None)
        if decoder is not None and not decoder.lives:  # it died between two pictures
            self._discard(decoder)
            decoder = None
        if decoder is None:
            decoder = self._own.decoder = _Decoder(self._argv)
            self._all.add(decoder)
        return decoder

    def _discard(self, decoder: _Decoder) -> None:
        decoder.end()
        self._all.discard(decoder)
        self._own.decoder = None


def _memory_bytes(limits: UploadLimits) -> int:
    return _BASE_BYTES + _BYTES_A_PIXEL * limits.max_pixels + 3 * limits.max_bytes


def _parsed(answer: bytes) -> ImageInfo | InvalidRequest | None:
    """None when memory ran out. What a decoder says is believed no further than this."""
    found: dict[str, Any] = json.loads(answer)
    if "exhausted" in found:
        return None
    if "refused" in found:
        return _REFUSALS[found["refused"]](str(found["message"]), **found["details"])
    picture = found["picture"]
    return ImageInfo(ImageType(picture["type"]), int(picture["width"]), int(picture["height"]))


class _Lost(Exception):
    """A decoder that gave no answer; `status` as Popen has it, None for one that was too slow."""

    def __init__(self, status: int | None, timeout_s: float) -> None:
        self._status = status
        reason = f"took longer than {timeout_s:g} s" if status is None else _ended_by(status)
        super().__init__(f"its decoder {reason}")

    def error(self) -> BrokenImage | DependencyUnavailable:
        """Whose fault it was: a signal but SIGKILL is the picture's doing, and so is slowness.

        Nothing in a decoder sends SIGKILL: that was the kernel, short of memory, or a person.
        """
        if self._status is not None and (self._status >= 0 or self._status == -signal.SIGKILL):
            return DependencyUnavailable(f"the picture was not examined: {self}")
        return BrokenImage(f"the picture cannot be decoded: {self}")


def _ended_by(status: int) -> str:
    if status == -signal.SIGXCPU:
        return "took too long"
    return f"crashed ({signal.Signals(-status).name})" if status < 0 else f"exited ({status})"


class _Decoder:
    """One process, and the line to it. For one thread at a time."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._process: subprocess.Popen[bytes]
        self._line, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    argv,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    env={"PATH": os.defpath, "PYTHONPATH": str(_PACKAGES)},
                )
            except OSError as error:
                self._line.close()
                raise DependencyUnavailable(f"no decoder can be started: {error}") from error
        self._wait_ready()

    def _wait_ready(self) -> None:
        """How long it takes to start is not held against a picture."""
        self._line.settimeout(_START_TIMEOUT_S)
        try:
            ready = self._line.recv(len(READY)) == READY
        except OSError:
            ready = False
        if not ready:
            self.end()
            raise DependencyUnavailable("a decoder did not start; see its last words in the log")

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def ask(self, data: bytes, timeout_s: float) -> ImageInfo | InvalidRequest | None:
        """What it answers, None if it has run out of memory. Raises _Lost."""
        deadline = time.monotonic() + timeout_s
        try:
            self._line.settimeout(timeout_s)
            self._line.sendall(SIZE.pack(len(data)))
            self._line.sendall(data)
            answer = b""
            while not answer.endswith(b"\n") and len(answer) < _MAX_ANSWER_BYTES:
                self._line.settimeout(max(deadline - time.monotonic(), 0.001))
                if not (chunk := self._line.recv(4096)):
                    break
                answer += chunk
            return _parsed(answer)
        except TimeoutError:
            raise _Lost(None, timeout_s) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _Lost(self._status(), timeout_s) from error

    def _status(self) -> int:
        """Of a process that has hung up: it is ending, or is made to. 0 for one that lies."""
        try:
            return self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return 0

    def end(self) -> None:
        self._line.close()
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
