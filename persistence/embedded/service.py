"""The description of a program that the supervisor keeps running.

The modules postgres, valkey and seaweed each build one. Other programs that run beside them are
described in the same way.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from restoration.processes.child import Account

# A server does not inherit the environment: a stray PGPORT or AWS_SESSION_TOKEN would change its
# behaviour, and it must not see the application's secrets.
BARE_ENV: Mapping[str, str] = MappingProxyType(
    {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
)


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A program to keep running.

    Every user of the machine can read `argv`, so secrets go into `env`, which is the program's
    whole environment, or into files. `probe` returns whether the server works, checked with its
    credentials; it takes at most a few seconds and does not raise. `prepare` runs before each
    start, and `initialise` when the probe first succeeds after it. Both must be repeatable, and may
    raise.
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
