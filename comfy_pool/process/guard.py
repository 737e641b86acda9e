"""The guard: a small program that owns an engine's process tree and outlives its owner.

`python -I -S guard.py ENGINE ARG...`, with one end of a stream socket as standard input; only the
owner holds the other end. The guard writes the engine's pid to it and, once nothing of the tree is
left, the engine's return code (negative for a signal), each on a line. A line that it reads is a
grace in seconds: stop the tree, TERM now and KILL after the grace. End of file says that the owner
is gone, and stops the tree likewise. Standard library only: it starts in 0.03 s.
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

ORPHAN_GRACE_S = 5.0  # for the tree of an owner that is gone
RESCAN_S = 0.1  # after a KILL, until the dead are reaped and their orphans have become ours

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None) if _LINUX else None  # loaded before any fork


def _prctl(option: int, value: int) -> None:
    if _libc is not None and _libc.prctl(option, value, 0, 0, 0):
        raise OSError(f"prctl({option}) was refused")


def detach() -> None:
    """Leave the owner's children, group and session, which die when their worker is cleaned up."""
    os.setsid()
    if os.fork():
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the owner's thread may have blocked some
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def spawn(argv: list[str]) -> int:
    """Start the engine in a group of its own, to be killed by the kernel if the guard dies."""
    guard = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        os.umask(0o077)  # pictures of others, in files that the engine makes as it likes
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the owner's socket is the guard's alone
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # it died before it could be watched
            os._exit(1)
        for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored_by_python, signal.SIG_DFL)
        os.execv(argv[0], argv)  # noqa: S606 - the owner's own command line, no shell wanted
    except OSError as error:
        os.write(2, f"cannot start {argv[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def descendants(root: int) -> list[int]:
    """Every living process below `root`, as /proc shows them now."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as stat:
                    # "pid (name) state ppid ...", where the name may hold anything
                    parent = int(stat.read().rpartition(b")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
            children.setdefault(parent, []).append(int(entry))
    found = [root]
    for pid in found:
        found += children.get(pid, ())
    return found[1:]


class Tree:
    """The engine and all it started; on Linux those too that left its group or session."""

    def __init__(self, engine: int) -> None:
        self.engine = engine
        self.returncode: int | None = None

    def reap(self) -> bool:
        """Collect the dead; False once no child is left."""
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
        targets = descendants(os.getpid()) if _LINUX else [-self.engine]
        for pid in targets:
            try:
                os.kill(pid, number)
            except (ProcessLookupError, PermissionError):  # gone, or (macOS) a group of zombies
                continue


class Guard:
    """Waits for the tree to end, or for a reason to stop it."""

    def __init__(self, tree: Tree, owner: socket.socket, signals: int) -> None:
        self.tree = tree
        self.owner = owner
        self.signals = signals
        self.sources: list[socket.socket | int] = [owner, signals]
        self.kill_at: float | None = None

    def run(self) -> None:
        """Return once nothing of the tree is left."""
        while self.tree.reap():
            if self.tree.returncode is not None:
                self.kill_at = 0  # what the engine left behind serves nobody
            ready, _, _ = select.select(self.sources, [], [], self._enforce())
            for grace_s in self._requests(ready):
                self._stop(grace_s)
        self.tree.send(signal.SIGKILL)  # without a subreaper the rest of the group is not ours

    def _enforce(self) -> float | None:
        """KILL if it is time; the seconds until there is something to do again."""
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
        """The grace of each wish to stop: a line, the owner's end, or a signal to the guard."""
        if self.owner in ready:
            yield from self._graces_from_owner()
        if self.signals in ready and set(os.read(self.signals, 256)) - {signal.SIGCHLD}:
            yield ORPHAN_GRACE_S

    def _graces_from_owner(self) -> list[float]:
        try:
            lines = self.owner.recv(256).split()
        except ConnectionResetError:  # the owner ended without reading our last report
            lines = []
        if lines:
            return [float(line) for line in lines]
        self.sources.remove(self.owner)
        return [ORPHAN_GRACE_S]


def watch_signals() -> int:
    """A descriptor on which the number of each signal arrives as a byte."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


def report(owner: socket.socket, number: int | None) -> None:
    with contextlib.suppress(OSError):  # the owner is gone, as end of file says, too
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
