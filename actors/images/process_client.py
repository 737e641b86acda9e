"""The owner's side of one image process: its start, its requests, and its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Any

from actors.images.messages import SIZE, frame, header_size, parse_header
from restoration.errors import DependencyUnavailable
from restoration.images import MEBIBYTE

Answer = tuple[dict[str, Any], list[bytes]]

_PACKAGES = Path(__file__).parents[2]
_ENVIRONMENT = {
    "PATH": os.defpath,
    "PYTHONPATH": str(_PACKAGES),
    "OPENBLAS_NUM_THREADS": "1",
    # Makes glibc return freed memory at once; otherwise it keeps that of large pictures.
    "MALLOC_MMAP_THRESHOLD_": str(MEBIBYTE),
}
# The main limit is CPU time, which does not depend on the machine's load. Elapsed time bounds a
# process that waits instead of computing.
_ELAPSED_A_CPU_S = 10.0


class ProcessLost(Exception):
    """A process ended or timed out without an answer.

    `by_picture`: the picture is the cause, as for a timeout or any signal but SIGKILL, which comes
    from the kernel when memory is short, or from an operator.
    """

    def __init__(self, status: int | None, elapsed_s: float) -> None:
        """`status` is Popen's return code, or None if the process took longer than `elapsed_s`."""
        self.by_picture = status is None or (status < 0 and status != -signal.SIGKILL)
        if status is None:
            super().__init__(f"took longer than {elapsed_s:g} s")
        elif status == -signal.SIGXCPU:
            super().__init__("exceeded its CPU time limit")
        elif status < 0:
            super().__init__(f"crashed ({signal.Signals(-status).name})")
        else:
            super().__init__(f"exited ({status})")


class ProcessClient:
    """One image process and its connection. It handles one request at a time."""

    def __init__(self, argv: Sequence[str], niceness: int) -> None:
        """Start the process; blocks, but not until it is ready. Raises DependencyUnavailable."""
        self._line, theirs = socket.socketpair()
        self._line.setblocking(False)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    argv,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    env=_ENVIRONMENT,
                )
            except OSError as error:
                self._line.close()
                raise DependencyUnavailable(f"cannot start an image process: {error}") from error
        if niceness:
            with suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, self._process.pid, niceness)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    async def ask(
        self,
        header: Mapping[str, Any],
        parts: Sequence[bytes],
        file: IO[bytes] | None = None,
        *,
        cpu_s: float,
        max_bytes: int,
    ) -> Answer:
        """Send a request with the open `file`, and return the first answer. Raises ProcessLost."""
        loop = asyncio.get_running_loop()
        first = frame(header, parts)
        async with self._within(cpu_s):
            if file is not None:
                sent = socket.send_fds(self._line, [first], [file.fileno()])
                first = first[sent:]
            for data in [first, *parts]:
                await loop.sock_sendall(self._line, data)
        return await self.answer(cpu_s, max_bytes)

    async def answer(self, cpu_s: float, max_bytes: int) -> Answer:
        """Return the next answer. Its parts have at most `max_bytes`. Raises ProcessLost."""
        async with self._within(cpu_s):
            size = header_size(await self._exactly(SIZE.size))
            header, sizes = parse_header(await self._exactly(size), max_bytes)
            return header, [await self._exactly(size) for size in sizes]

    @asynccontextmanager
    async def _within(self, cpu_s: float) -> AsyncIterator[None]:
        """Limit the elapsed time, and convert errors to ProcessLost."""
        elapsed_s = cpu_s * _ELAPSED_A_CPU_S
        try:
            async with asyncio.timeout(elapsed_s):
                yield
        except TimeoutError:
            raise ProcessLost(None, elapsed_s) from None
        except (OSError, ValueError) as error:
            try:
                status = await asyncio.to_thread(self._process.wait, 1)
            except subprocess.TimeoutExpired:  # it has closed its connection, and still runs
                status = 0
            raise ProcessLost(status, elapsed_s) from error

    async def _exactly(self, size: int) -> bytes:
        data, filled = bytearray(size), 0
        loop = asyncio.get_running_loop()
        while filled < size:
            got = await loop.sock_recv_into(self._line, memoryview(data)[filled:])
            if not got:
                raise ConnectionError("the process closed the connection")
            filled += got
        return bytes(data)

    def end(self) -> None:
        """Kill the process. Call `reap`, which blocks, afterwards on another thread."""
        self._line.close()
        self._process.kill()

    def reap(self) -> None:
        self._process.wait()
