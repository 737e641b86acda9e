"""Create virtual environments and install pinned packages, under a lock.

Blocking; for set-up only. A failed tool raises ProvisionFailed, whose message ends with the tool's
last lines of output.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import uv

from restoration.errors import ProvisionFailed

Progress = Callable[[str], None]
# A slow connection may need most of an hour for the engine's 3 GB of wheels.
TOOL_TIMEOUT_S = 3600.0
_LAST_LINES = 6


@dataclass(frozen=True, slots=True)
class PinnedWheel:
    """A wheel pinned by version and sha256. `build` holds pip options that select the build."""

    requirement: str
    sha256: str
    build: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Toolbox:
    """Runs installers while `lock` is held.

    Each tool inherits the lock's descriptor. If the installing process is killed, the next one
    therefore also waits until the remaining tools have ended.
    """

    lock: BinaryIO
    progress: Progress

    def run(self, command: Sequence[str | Path], doing: str) -> None:
        """Run `command` to its end. Raises ProvisionFailed, whose message starts with `doing`."""
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=TOOL_TIMEOUT_S,
                pass_fds=(self.lock.fileno(),),
            )
        except subprocess.TimeoutExpired as error:
            raise ProvisionFailed(f"{doing} took longer than {TOOL_TIMEOUT_S:.0f} s") from error
        except OSError as error:
            raise ProvisionFailed(f"{doing} could not start {command[0]}: {error}") from error
        if done.returncode != 0:
            raise ProvisionFailed(
                f"{doing} failed with status {done.returncode}: {last_lines(done.stdout)}"
            )

    def create_environment(self, folder: Path) -> Path:
        """Create a virtual environment and return its Python.

        It has no pip, since installers run outside it.
        """
        self.run([sys.executable, "-m", "venv", "--without-pip", folder], "creating an environment")
        return folder / "bin" / "python"

    def install(self, python: Path, *what: str | Path) -> None:
        """Install `what` (requirements, or `-r file`) into the environment of `python`.

        Use uv, which takes about 40 s for the engine where pip takes several minutes. If uv fails,
        try pip, because only pip reads the machine's pip configuration (such as a private index).
        """
        doing = "installing packages"
        try:
            command = [uv.find_uv_bin(), "pip", "install", "--quiet", "--python", python, *what]
            self.run(command, doing)
        except (ProvisionFailed, FileNotFoundError) as error:
            self.progress(f"uv failed, trying pip ({error})")
            self.run([*_PIP, "--python", str(python), "install", "--quiet", *what], doing)

    def download(self, wheel: PinnedWheel, folder: Path) -> Path:
        """Download `wheel` into the empty `folder`, verify its sha256 and return its path."""
        pin = folder / "pin.txt"
        pin.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
        options += [f"--{name}={value}" for name, value in wheel.build.items()]
        self.run(
            [*_PIP, "download", *options, "--dest", folder, "-r", pin],
            f"downloading {wheel.requirement}",
        )
        return next(folder.glob("*.whl"))


_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


def last_lines(output: str) -> str:
    """Return the end of a tool's output on one line; tools report errors there."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-_LAST_LINES:]) or "it printed nothing"


@contextmanager
def toolbox(lock_path: Path, progress: Progress) -> Iterator[Toolbox]:
    """Yield a Toolbox that holds an exclusive lock on `lock_path`, waiting for it if needed."""
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another installation to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield Toolbox(lock, progress)
