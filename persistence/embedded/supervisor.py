"""Starts services in order, each once the one before is ready, and stops them in reverse.

A context manager: whatever ends the block, or the start-up itself, ends the services; and the
kernel ends them if this process is killed.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from persistence.embedded.keeper import Keeper, Pace
from persistence.embedded.service import Service


class Supervisor:
    """Keeps `services` alive between `start` and `stop`.

    `log_path` says where each writes. The methods that take a name raise KeyError for a service
    that is not supervised here.
    """

    def __init__(
        self, services: Sequence[Service], log_path: Callable[[str], Path], pace: Pace | None = None
    ) -> None:
        pace = pace or Pace()
        self._keepers = {
            service.name: Keeper(service, log_path(service.name), pace) for service in services
        }

    def start(self) -> None:
        """Return when all are ready; if that fails or is interrupted, none is left running.

        Raises DependencyUnavailable, with the end of the log, for one that does not get ready.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)
            for keeper in self._keepers.values():
                keeper.start()
            undo.pop_all()

    def stop(self) -> None:
        """Stop all, last started first, and return when they are gone. May be repeated."""
        with contextlib.ExitStack() as stack:  # which goes on when one is interrupted
            for keeper in self._keepers.values():
                stack.callback(keeper.stop)

    def restart(self, name: str) -> None:
        """Stop one properly and return when it is ready again."""
        self._keepers[name].restart()

    def pid(self, name: str) -> int | None:
        """The server's process; None between two lives."""
        return self._keepers[name].pid

    def answers(self, name: str) -> bool:
        """Probe one now, whatever its keeper knows; takes at most a few seconds."""
        return self._keepers[name].service.probe()

    def log_path(self, name: str) -> Path:
        return self._keepers[name].log_path

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let the first SIGTERM unwind the main thread, as Ctrl-C does; later ones change nothing.

    By default SIGTERM ends the process on the spot, and with it every service, without a chance
    to shut down properly.
    """

    def unwind(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
