"""The state folder of a local stack, with its ports and secrets; one supervisor locks it.

Ports and secrets are chosen once, so that addresses stay valid after a restart. They are in one
file of mode 0600, which is replaced atomically.
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
from typing import Self

from restoration.errors import SetupError

# Below the ephemeral ports of all common systems, so that no outgoing connection takes one.
PORTS = range(22_000, 30_000)
PAIRED_PORTS = range(20_000, 22_000)
PAIR_OFFSET = 10_000

LOCK = "lock"  # locked by the folder's supervisor
LOCK_PATIENCE_S = 0.3  # wait for the lock, because `holder_of` takes it for an instant


def is_free(port: int) -> bool:
    """Return whether `port` of the loopback address is free now."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@dataclass(slots=True)
class StateDir:
    """A locked state folder. Create it with `StateDir.locked`. `path` is absolute."""

    path: Path
    _is_free: Callable[[int], bool] = is_free
    _ports: dict[str, int] = field(default_factory=dict)
    _secrets: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    @contextlib.contextmanager
    def locked(cls, path: Path, is_free: Callable[[int], bool] = is_free) -> Iterator[Self]:
        """Create or open the folder, and lock it until the block ends.

        Raises SetupError if another supervisor has locked it, or if it cannot be used.
        """
        path = path.expanduser().absolute()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Root's Postgres runs under another account, which must traverse the folder. Secrets
            # have their own modes.
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
        """Choose ports and secrets for names that have none yet, and save them.

        A name in `paired_ports` also gets the port PAIR_OFFSET above its own. Raises SetupError if
        no port is free.
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
            content = {"ports": self._ports, "secrets": self._secrets}
            write_private(self.path / "state.json", json.dumps(content, indent=1))

    def port(self, name: str) -> int:
        return self._ports[name]

    def secret(self, name: str) -> str:
        return self._secrets[name]

    def folder(self, name: str) -> Path:
        """Return a private subfolder, and create it if it is missing."""
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
            raise SetupError(f"{file} is not a valid state file: {error}") from error


def write_private(path: Path, text: str) -> None:
    """Replace `path` atomically with a file of mode 0600."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    draft.replace(path)


def holder_of(path: Path) -> int | None:
    """Return the pid of the process that has locked the state folder `path`, or None."""
    try:
        with open(path.expanduser() / LOCK) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0) or None
    except FileNotFoundError:
        pass
    return None


@contextlib.contextmanager
def holding(lock: Path) -> Iterator[None]:
    """Lock the file, and write this process's pid into it for the errors of other processes.

    Raises SetupError if it stays locked for LOCK_PATIENCE_S.
    """
    with open(os.open(lock, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = file.read() or "unknown"
                    raise SetupError(
                        f"the state folder {lock.parent} is in use by the process with pid "
                        f"{holder}; stop it first, or choose another folder"
                    ) from None
                time.sleep(LOCK_PATIENCE_S / 10)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
