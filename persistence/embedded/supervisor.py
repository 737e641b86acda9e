"""Start services in order, each when the one before is ready, and stop them in reverse order.

The services stop when the `with` block or the start-up ends in any way. If this process is killed,
the kernel kills them.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

from persistence.embedded.keeper import Keeper, Pace
from persistence.embedded.service import Service


class Supervisor:
    """Keeps `services` running between `start` and `stop`.

    `log_path` returns the log file of a service. Methods that take a name raise KeyError for an
    unknown service.
    """

    def __init__(
        self, services: Sequence[Service], log_path: Callable[[str], Path], pace: Pace | None = None
    ) -> None:
        pace = pace or Pace()
        self._keepers = {
            service.name: Keeper(service, log_path(service.name), pace) for service in services
        }

    def start(self) -> None:
        """Start all services and wait until they are ready; stop them on an error or interrupt.

        Raises DependencyUnavailable, with the end of the log, if one does not become ready.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)
            for keeper in self._keepers.values():
                keeper.start()
            undo.pop_all()

    def stop(self) -> None:
        """Stop all services in reverse order, and wait until they have ended. Idempotent."""
        with contextlib.ExitStack() as stack:  # continues if one `stop` is interrupted
            for keeper in self._keepers.values():
                stack.callback(keeper.stop)

    def pid(self, name: str) -> int | None:
        """Return the pid of the service's process, or None while none runs."""
        return self._keepers[name].pid

    def answers(self, name: str) -> bool:
        """Probe one service now and return whether it works. Takes at most a few seconds."""
        return self._keepers[name].service.probe()

    def log_path(self, name: str) -> Path:
        return self._keepers[name].log_path

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Make the first SIGTERM raise SystemExit in the main thread, and ignore later ones.

    By default SIGTERM ends the process at once, so that the services are killed instead of shut
    down.
    """

    def unwind(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
