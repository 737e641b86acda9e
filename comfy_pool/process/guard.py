"""Guard program that owns an engine's process tree and stops it when the owner is gone.

Run as `python -I -S guard.py ENGINE ARG...` with one end of a stream socket as standard input; the
owner holds the only other end. Protocol, one number on each line:

- The guard writes the engine's pid, and once the whole tree has ended, the engine's return code
  (negative for a signal).
- The owner writes a grace in seconds to stop the tree: SIGTERM now, SIGKILL after the grace.
- End of file means that the owner is gone, and stops the tree with ORPHAN_GRACE_S.

It imports only the standard library, so it starts in 0.03 s.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator

ORPHAN_GRACE_S = 5.0  # when the owner is gone, or a signal stops the guard
RESCAN_S = 0.1  # after SIGKILL: time to reap the dead and to adopt their orphans

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None) if _LINUX else None  # loaded before any fork


def _prctl(option: int, value: int) -> None:
    if _libc is not None and _libc.prctl(option, value, 0, 0, 0):
        raise OSError(f"prctl({option}) was refused")


def detach() -> None:
    """Leave the owner's children, process group and session, which are killed with the worker."""
    os.setsid()
    if os.fork():
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the owner's thread may have blocked some
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def spawn(argv: list[str]) -> int:
    """Start the engine in its own process group and return its pid.

    On Linux the kernel kills the engine if the guard dies.
    """
    guard = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        os.umask(0o077)  # the engine's files hold users' photos
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # only the guard keeps the owner's socket
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # the guard died before prctl took effect
            os._exit(1)
        for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored_by_python, signal.SIG_DFL)
        os.execv(argv[0], argv)  # noqa: S606 - the owner's own command line, no shell wanted
    except OSError as error:
        os.write(2, f"cannot start {argv[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def descendants(root: int) -> list[int]:
    """Return the pids of all processes below `root`, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as stat:
                    # "pid (name) state ppid ..."; the name may contain parentheses and spaces
                    parent = int(stat.read().rpartition(b")")[2].split()[1])
            except OSError:  # the process has ended
                continue
            children.setdefault(parent, []).append(int(entry))
    found = [root]
    for pid in found:
        found += children.get(pid, ())
    return found[1:]


class Tree:
    """The engine and its descendants; on Linux also those that left its group or session."""

    def __init__(self, engine: int) -> None:
        self.engine = engine
        self.returncode: int | None = None

    def reap(self) -> bool:
        """Reap ended children. Return False once no child is left."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == self.engine:
                    self.returncode = os.waitstatus_to_exitcode(status)
                if not pid:
                    return True
        except ChildProcessError:
            return False

    def send(self, number: int) -> None:
        """Send a signal to all processes of the tree."""
        targets = descendants(os.getpid()) if _LINUX else [-self.engine]
        for pid in targets:
            try:
                os.kill(pid, number)
            except (ProcessLookupError, PermissionError):  # ended, or (macOS) a group of zombies
                continue


class Guard:
    """Waits until the tree ends, and stops it on request."""

    def __init__(self, tree: Tree, owner: socket.socket, signals: int) -> None:
        self.tree = tree
        self.owner = owner
        self.signals = signals
        self.sources: list[socket.socket | int] = [owner, signals]
        self.kill_at: float | None = None

    def run(self) -> None:
        """Return once all processes of the tree have ended."""
        while self.tree.reap():
            if self.tree.returncode is not None:
                self.kill_at = 0  # the engine has ended: kill the processes that it left
            ready, _, _ = select.select(self.sources, [], [], self._enforce())
            for grace_s in self._requests(ready):
                self._stop(grace_s)
        self.tree.send(signal.SIGKILL)  # without a subreaper, reap() misses orphans of the group

    def _enforce(self) -> float | None:
        """Send SIGKILL if it is due. Return the seconds until the next check, None for never."""
        if self.kill_at is None:
            return None
        left_s = self.kill_at - time.monotonic()
        if left_s > 0:
            return left_s
        self.tree.send(signal.SIGKILL)
        return RESCAN_S

    def _stop(self, grace_s: float) -> None:
        if self.kill_at is None:
            self.tree.send(signal.SIGTERM)
        kill_at = time.monotonic() + grace_s
        self.kill_at = kill_at if self.kill_at is None else min(self.kill_at, kill_at)

    def _requests(self, ready: list[socket.socket | int]) -> Iterator[float]:
        """Yield the grace of each stop request: a line, end of file, or a signal to the guard."""
        if self.owner in ready:
            yield from self._graces_from_owner()
        if self.signals in ready and set(os.read(self.signals, 256)) - {signal.SIGCHLD}:
            yield ORPHAN_GRACE_S

    def _graces_from_owner(self) -> list[float]:
        try:
            lines = self.owner.recv(256).split()
        except ConnectionResetError:  # the owner ended without reading the last report
            lines = []
        if lines:
            return [float(line) for line in lines]
        self.sources.remove(self.owner)
        return [ORPHAN_GRACE_S]


def watch_signals() -> int:
    """Return a descriptor that receives the number of each signal as a byte."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


def report(owner: socket.socket, number: int | None) -> None:
    with contextlib.suppress(OSError):  # the owner is gone; end of file reports that as well
        owner.sendall(f"{number}\n".encode())


def main(argv: list[str]) -> None:
    detach()
    owner = socket.socket(fileno=0)
    tree = Tree(spawn(argv))
    signals = watch_signals()  # after the fork: the engine starts with the default handlers
    report(owner, tree.engine)
    Guard(tree, owner, signals).run()
    report(owner, tree.returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
