"""The folder a local stack lives in: held by one supervisor at a time, with its ports and secrets.

Ports and secrets are chosen once and stay: whatever was told an address finds it again after a
restart. They lie in one file, 0600, that is replaced as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from restoration.errors import SetupError

# Below the ephemeral ports of every common system, so that no outgoing connection takes one.
PORTS = range(22_000, 30_000)
PAIRED_PORTS = range(20_000, 22_000)
PAIR_OFFSET = 10_000

LOCK = "lock"  # held by the supervisor of the folder
LOCK_PATIENCE_S = 0.3  # `holder_of` takes the lock for an instant


def is_free(port: int) -> bool:
    """Whether this machine's loopback has nobody on `port` right now."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@dataclass(slots=True)
class StateDir:
    """A held state folder. `path` is absolute; get one from `StateDir.locked`."""

    path: Path
    _is_free: Callable[[int], bool] = is_free
    _ports: dict[str, int] = field(default_factory=dict)
    _secrets: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    @contextlib.contextmanager
    def locked(cls, path: Path, is_free: Callable[[int], bool] = is_free) -> Iterator[Self]:
        """Create or open the folder and hold it until the block ends.

        Raises SetupError when another supervisor holds it, or when it cannot be used.
        """
        path = path.expanduser().absolute()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Root's Postgres runs under another account, which has to pass through; what is
            # secret has a mode of its own.
            path.chmod(0o711 if os.geteuid() == 0 else 0o700)
            with holding(path / LOCK):
                state = cls(path, is_free)
                state._load()
                yield state
        except PermissionError as error:
            raise SetupError(f"cannot use the state folder {path}: {error}") from error

    def reserve(
        self,
        *,
        ports: Iterable[str] = (),
        paired_ports: Iterable[str] = (),
        secrets_for: Iterable[str] = (),
    ) -> None:
        """Choose what has not been chosen before, and write all of it down at once.

        A paired port's owner also gets the port PAIR_OFFSET above it.
        """
        before = len(self._ports) + len(self._secrets)
        for name in ports:
            if name not in self._ports:
                self._ports[name] = self._choose_port(PORTS, (0,))
        for name in paired_ports:
            if name not in self._ports:
                self._ports[name] = self._choose_port(PAIRED_PORTS, (0, PAIR_OFFSET))
        for name in secrets_for:
            self._secrets.setdefault(name, secrets.token_hex(20))
        if len(self._ports) + len(self._secrets) > before:
            self._save()

    def port(self, name: str) -> int:
        return self._ports[name]

    def secret(self, name: str) -> str:
        return self._secrets[name]

    def folder(self, name: str) -> Path:
        """A folder in here that nobody else can read, made when missing."""
        folder = self.path / name
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def log_path(self, name: str) -> Path:
        return self.folder("logs") / f"{name}.log"

    def _choose_port(self, candidates: range, offsets: tuple[int, ...]) -> int:
        untried = [port for port in candidates if port not in self._ports.values()]
        while untried:
            port = untried.pop(secrets.randbelow(len(untried)))
            if all(self._is_free(port + offset) for offset in offsets):
                return port
        raise SetupError(f"no free port between {candidates.start} and {candidates.stop - 1}")

    def _load(self) -> None:
        file = self.path / "state.json"
        try:
            content = json.loads(file.read_bytes())
            self._ports.update(content["ports"])
            self._secrets.update(content["secrets"])
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            raise SetupError(f"{file} is not a state file of ours: {error}") from error

    def _save(self) -> None:
        content = {"ports": self._ports, "secrets": self._secrets}
        write_private(self.path / "state.json", json.dumps(content, indent=1))


def write_private(path: Path, text: str) -> None:
    """Replace `path`, as a whole or not at all, with a file that only its owner can read."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    draft.replace(path)


def holder_of(path: Path) -> int | None:
    """The pid of the process that holds the state folder `path`, or None."""
    try:
        with open(path.expanduser() / LOCK) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0) or None
    except FileNotFoundError:
        pass
    return None


def _lock_within(file: IO[str], patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(patience_s / 10)
        else:
            return True


@contextlib.contextmanager
def holding(lock: Path) -> Iterator[None]:
    """Hold the lock file, with our pid in it for whoever comes second."""
    with open(os.open(lock, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        if not _lock_within(file, LOCK_PATIENCE_S):
            holder = file.read() or "unknown"
            raise SetupError(
                f"the state folder {lock.parent} is in use by the process with pid {holder}; "
                "stop it first, or choose another folder"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
