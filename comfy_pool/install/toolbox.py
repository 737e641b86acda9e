"""The package index as this project uses it: virtual environments, pinned wheels, one lock.

Blocking, for set-up only. Whatever a tool says when it fails becomes one ProvisionFailed whose
message ends with the tool's own last lines.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import uv

from restoration.errors import ProvisionFailed

Progress = Callable[[str], None]
# A slow line may need most of an hour for the engine's 3 GB of wheels.
TOOL_TIMEOUT_S = 3600.0
_LAST_LINES = 6


@dataclass(frozen=True, slots=True)
class PinnedWheel:
    """One wheel by exact version and sha256; `platform` are pip options that choose its build."""

    requirement: str
    sha256: str
    platform: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Toolbox:
    """Runs installers while holding `lock`.

    Every tool inherits the lock's descriptor: when the installing process is killed, the next
    one waits until the tools it left behind have ended, too.
    """

    lock: BinaryIO
    progress: Progress

    def run(self, command: Sequence[str | Path], doing: str) -> None:
        """Run `command` to its end. Raises ProvisionFailed, `doing` says what failed."""
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
        """Make a virtual environment without pip (installers act on it from outside)."""
        self.run([sys.executable, "-m", "venv", "--without-pip", folder], "creating an environment")
        return folder / "bin" / "python"

    def install(self, python: Path, *what: str | Path) -> None:
        """Install `what` (requirements, or `-r file`) into the environment of `python`.

        uv needs about 40 s for the engine where pip needs several minutes. pip is the second
        try because it alone reads the machine's pip configuration (a private index, say).
        """
        doing = "installing packages"
        try:
            self.run([_uv(), "pip", "install", "--quiet", "--python", python, *what], doing)
        except ProvisionFailed as error:
            self.progress(f"uv did not manage, trying pip ({error.message})")
            self.run([*_PIP, "--python", str(python), "install", "--quiet", *what], doing)

    def download(self, wheel: PinnedWheel, folder: Path) -> Path:
        """Fetch exactly `wheel` into the empty `folder` and return its path."""
        pin = folder / "pin.txt"
        pin.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
        self.run(
            [*_PIP, "download", *options, *wheel.platform, "--dest", folder, "-r", pin],
            f"downloading {wheel.requirement}",
        )
        return next(folder.glob("*.whl"))


_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


def _uv() -> str:
    try:
        return uv.find_uv_bin()
    except FileNotFoundError as error:
        raise ProvisionFailed(f"uv is not installed: {error}") from error


def last_lines(output: str) -> str:
    """The end of a tool's output on one line: it is where tools say what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-_LAST_LINES:]) or "it said nothing"


@contextmanager
def toolbox(lock_path: Path, progress: Progress) -> Iterator[Toolbox]:
    """Hold `lock_path` exclusively, waiting for whoever has it."""
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another installation to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield Toolbox(lock, progress)
