"""A local stack for the length of a `with` block, and the ways to reach it.

For scripts, tests and benchmarks that need the whole service:

    with temporary_stack(workers=2) as stack, stack.client() as client:
        result = client.restore(Path("photo.jpg"))
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from restoration.errors import SetupError
from serve_app.auth.local_issuer import LOCAL_AUDIENCE, mint_token
from serve_app.auth.scopes import USER_SCOPES
from serve_app.client import RestorationClient
from serve_app.local.record import (
    StackOptions,
    StackRecord,
    find_stack,
    issuer_folder,
    start_detached,
    stop_stack,
    wait_until_serving,
)


@dataclass(frozen=True)
class LocalStack:
    """The stack of a state folder. `environ` has the settings that it was started with."""

    state_dir: Path
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def record(self) -> StackRecord:
        """Return the stack's addresses. Raises SetupError if it is not running."""
        record = find_stack(self.state_dir)
        if record is None:
            raise SetupError(f"no local stack is running in {self.state_dir}")
        return record

    def token(
        self,
        sub: str = "local",
        scopes: Iterable[str] = USER_SCOPES,
        claims: Mapping[str, object] | None = None,
    ) -> str:
        """Return a token of the stack's own issuer. Raises SetupError if it has none."""
        issuer = self.record.issuer
        if issuer is None:
            raise SetupError("the stack has no issuer of its own, since AUTH0_DOMAIN is set")
        keys = issuer_folder(self.state_dir)
        return mint_token(keys, issuer, LOCAL_AUDIENCE, sub, scopes, more_claims=claims or {})

    def client(self, sub: str = "local") -> RestorationClient:
        """Return a client of the service, for the jobs of `sub`."""
        return RestorationClient(self.record.url, self.token(sub))


@contextmanager
def temporary_stack(
    workers: int = 1, environ: Mapping[str, str] | None = None
) -> Iterator[LocalStack]:
    """Run a stack in a temporary state folder and on a free port until the block ends.

    `environ` is added to this process's environment. Services whose addresses it has are used, not
    started. Raises SetupError if the stack does not start.
    """
    with TemporaryDirectory(prefix="comfy-restore-", ignore_cleanup_errors=True) as folder:
        stack = LocalStack(Path(folder), environ or {})
        options = StackOptions(workers, free_port())
        process = start_detached(stack.state_dir, options, stack.environ)
        try:
            wait_until_serving(process, stack.state_dir, lambda _line: None)
            yield stack
        finally:
            stop_stack(stack.state_dir)
            process.wait()  # it has ended by now


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
