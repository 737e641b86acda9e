"""What the supervisor has to know about a server: one frozen description, nothing else.

The modules postgres, valkey and seaweed each build one; any other program that should be kept
alive beside them is described the same way.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

# A server inherits nothing of our environment: a stray PGPORT or AWS_SESSION_TOKEN changes what
# these programs do, and they have no business with our secrets.
BARE_ENV: Mapping[str, str] = MappingProxyType(
    {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
)


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Account:
    """An account to drop to before the program starts; only root can."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One program to keep running.

    `argv` is readable by every user of the machine: secrets go into `env` (all the program gets)
    or into files. `probe` says whether the server does its work, checked with its credentials; it
    answers within a few seconds and does not raise. `prepare` runs before each start,
    `initialise` each time the probe first succeeds; both may be repeated, and may raise.
    """

    name: str
    argv: tuple[str, ...]
    cwd: Path
    probe: Callable[[], bool]
    env: Mapping[str, str] = field(default_factory=lambda: BARE_ENV, repr=False)
    run_as: Account | None = None
    prepare: Callable[[], None] = _nothing
    initialise: Callable[[], None] = _nothing
    stop_signal: signal.Signals = signal.SIGTERM
    grace_s: float = 10.0
    start_timeout_s: float = 30.0
