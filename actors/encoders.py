"""Processes that write pictures, so that neither the worker nor its engine has to.

A picture of 4096x4096 pixels takes a core the better part of a second. Each encoder is a child
that waits for orders on its standard input, and ends with it: none outlives its worker. A small
picture is written in less time than it takes to have it written.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import IO, Self, cast

import numpy as np
from numpy.typing import NDArray

from actors.images.encode import encode
from restoration.engine import EngineResult, Pixels
from restoration.jobs import OutputFormat

# Engines go first: a GPU that waits costs more than a picture that does.
_NICENESS = 5
SMALL_PIXELS = 2**18  # a few milliseconds, most of them outside the interpreter's lock
# Memory goes back as soon as it is free: else glibc keeps what a large picture took, up to 8
# bytes a pixel.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


Order = tuple[EngineResult, OutputFormat, int, NDArray[np.uint8] | None, bytes | None, bool]


class EncoderFailed(Exception):
    """An encoder could not write the picture, or died of it."""


class Encoders:
    """So many encoder processes; an async context manager."""

    def __init__(self, processes: int, small_pixels: int = SMALL_PIXELS) -> None:
        """What the engine hands over with up to `small_pixels` is encoded by a thread."""
        self._small_pixels = small_pixels
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="encoder")
        self._encoders = [_Encoder() for _ in range(processes)]
        self._idle: queue.SimpleQueue[_Encoder] = queue.SimpleQueue()
        for encoder in self._encoders:
            self._idle.put(encoder)

    @property
    def pids(self) -> list[int]:
        """Of the processes, whether they live or not."""
        return [encoder.pid for encoder in self._encoders]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def encode(
        self,
        picture: EngineResult,
        output_format: OutputFormat,
        quality: int,
        alpha: NDArray[np.uint8] | None = None,
        exif: bytes | None = None,
        grey: bool = False,
    ) -> bytes:
        """See `actors.images.encode`, whose errors a small one raises. Raises EncoderFailed."""
        order = (picture, output_format, quality, alpha, exif, grey)
        if isinstance(picture, Pixels) and picture.width * picture.height <= self._small_pixels:
            return await asyncio.to_thread(encode, *order)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._write, order)

    def _write(self, order: Order) -> bytes:
        encoder = self._idle.get()
        try:
            return encoder.write(order)
        except OSError as error:
            raise EncoderFailed(f"the encoder died: {error}") from error
        finally:
            self._idle.put(encoder)

    async def aclose(self) -> None:
        """Wait for the pictures that are being written, and end the processes."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        for encoder in self._encoders:
            await asyncio.to_thread(encoder.end)


class _Encoder:
    """A child, and the worker's end of the pipes to it."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "actors.encoders"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ENVIRONMENT},
        )
        self._orders = cast("IO[bytes]", self._process.stdin)
        self._answers = cast("IO[bytes]", self._process.stdout)

    @property
    def pid(self) -> int:
        return self._process.pid

    def write(self, order: Order) -> bytes:
        """Raises OSError when the child dies of it, or cannot be started in the place of one that
        did: what there was no memory for just now is tried again with the next order."""
        if self._orders.closed:
            self._start()
        with ExitStack() as on_trouble:  # no answer is read that half of another stands before
            on_trouble.callback(self.end)
            answer = self._ask(order)
            on_trouble.pop_all()
        if isinstance(answer, str):
            raise EncoderFailed(answer)
        return answer

    def _ask(self, order: Order) -> bytes | str:
        try:
            pickle.dump(order, self._orders)
            self._orders.flush()
            answer: bytes | str = pickle.load(self._answers)  # noqa: S301 # our own child's
        except (EOFError, pickle.UnpicklingError) as error:
            raise OSError(f"exit status {self._process.poll()}") from error
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        with suppress(OSError):  # half an order may not have got through
            self._orders.close()


def main() -> None:
    """The child: one order after the other, until nobody can give any more."""
    os.nice(_NICENESS)
    orders, answers = sys.stdin.buffer, sys.stdout.buffer
    while (order := _next(orders)) is not None:
        pickle.dump(_obey(order), answers)
        answers.flush()


def _next(orders: IO[bytes]) -> Order | None:
    try:
        order: Order = pickle.load(orders)  # noqa: S301 # our own parent's
    except EOFError:
        return None
    return order


def _obey(order: Order) -> bytes | str:
    """The picture, or what went wrong."""
    try:
        return encode(*order)
    except Exception as error:  # noqa: BLE001 # the child's supervisor: it is told to the parent
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
