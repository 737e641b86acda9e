"""Guard program that owns a process tree and ends it when its owner is gone.

Run as `python -I -S guard.py OPTION... -- PROGRAM ARG...` with one end of a stream socket as the
descriptor `--lifeline`; the owner holds the only other end. Protocol, one number on each line:

- The guard writes the program's pid, and once the whole tree has ended, the program's return code
  (negative for a signal). It omits the code if it may not signal the program or a descendant, which
  has changed its account, and ends without them.
- The owner writes a grace in seconds to stop the tree: the stop signal now, SIGKILL after the
  grace. A grace of 0 kills at once.
- End of file means that the owner is gone, and stops the tree with `--orphan-grace`.

It imports only the standard library, so it starts in 0.03 s.
"""

import argparse
import contextlib
import ctypes  # before setuid, because the other account may be unable to read the interpreter
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator

RESCAN_S = 0.1  # after SIGKILL: time to reap the dead and to adopt their orphans
REFUSED_S = 5.0  # after SIGKILL: how long to wait for processes that may not be signalled

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None, use_errno=True) if _LINUX else None  # loaded before any fork


def prctl(option: int, *arguments: int) -> None:
    """Call prctl(2). Does nothing on other systems than Linux. Raises OSError."""
    values = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc is not None and _libc.prctl(option, *values):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends. Raises OSError."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def spawn(options: argparse.Namespace) -> int:
    """Start the program in its own process group and return its pid.

    On Linux the kernel kills the program if the guard dies.
    """
    guard = os.getpid()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # the program does it too; neither may come too late
            os.setpgid(pid, pid)
        return pid
    program = options.program
    try:
        os.setpgid(0, 0)
        os.umask(0o077)  # a program's files hold users' photos
        if options.uid is not None:
            os.setgroups([])
            os.setgid(options.gid)
            os.setuid(options.uid)
        die_with_parent()  # after setuid, which clears the setting
        if os.getppid() != guard:  # the guard died before prctl took effect
            os._exit(1)
        # Python ignores the first two. The others are ignored in the background of a shell.
        for ignored in ("SIGPIPE", "SIGXFSZ", "SIGINT", "SIGQUIT", "SIGTERM"):
            signal.signal(signal.Signals[ignored], signal.SIG_DFL)
        os.execvp(program[0], program)  # noqa: S606 - the owner's own command line, no shell wanted
    except OSError as error:
        os.write(2, f"cannot start {program[0]}: {error}\n".encode())
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
    """The program and its descendants; on Linux also those that left its group or session."""

    def __init__(self, program: int) -> None:
        self.program = program
        self.returncode: int | None = None

    def reap(self) -> bool:
        """Reap ended children. Return False once no child is left."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == self.program:
                    self.returncode = os.waitstatus_to_exitcode(status)
                if not pid:
                    return True
        except ChildProcessError:
            return False

    def send(self, number: int, *, whole: bool) -> list[int]:
        """Send a signal to all processes of the tree, or to the program only.

        Return the pids of those that run under another account and may not be signalled.
        """
        refused = []
        if not whole:
            targets = [self.program]
        else:
            targets = descendants(os.getpid()) if _LINUX else [-self.program]
        for pid in targets:
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # ended
                continue
            except PermissionError:
                if _LINUX:  # on macOS also a group of zombies
                    refused.append(pid)
        return refused


class Guard:
    """Waits until the tree ends, and stops it on request."""

    def __init__(
        self, tree: Tree, owner: socket.socket, signals: int, options: argparse.Namespace
    ) -> None:
        self.tree = tree
        self.owner = owner
        self.signals = signals
        self.options = options
        self.sources = select.poll()  # `select` would refuse descriptors above 1023
        for source in (owner.fileno(), signals):
            self.sources.register(source, select.POLLIN)
        self.received = b""
        self.kill_at = math.inf

    def run(self) -> None:
        """Return once all processes of the tree have ended. Raises PermissionError."""
        while self.tree.reap():
            if self.tree.returncode is not None:
                # The program has ended: kill the processes that it left.
                self.kill_at = min(self.kill_at, time.monotonic())
            for grace_s in self._requests(self._enforce()):
                if self.kill_at == math.inf and grace_s > 0:
                    self.tree.send(self.options.stop_signal, whole=self.options.stop_tree)
                self.kill_at = min(self.kill_at, time.monotonic() + grace_s)
        # Without a subreaper, reap() misses orphans of the group.
        self.tree.send(signal.SIGKILL, whole=True)

    def _enforce(self) -> float | None:
        """Send SIGKILL if it is due. Return the seconds until the next check, None for never."""
        if self.kill_at == math.inf:
            return None
        left_s = self.kill_at - time.monotonic()
        if left_s > 0:
            return left_s
        refused = self.tree.send(signal.SIGKILL, whole=True)
        if refused and left_s < -REFUSED_S:
            raise PermissionError(" ".join(map(str, refused)))
        return RESCAN_S

    def _requests(self, timeout_s: float | None) -> Iterator[float]:
        """Yield the grace of each stop request: a line, end of file, or a signal to the guard."""
        ready = {
            descriptor
            for descriptor, _ in self.sources.poll(None if timeout_s is None else timeout_s * 1000)
        }
        if self.owner.fileno() in ready:
            try:
                chunk = self.owner.recv(256)
            except ConnectionResetError:  # the owner ended without reading the last report
                chunk = b""
            if not chunk:
                self.sources.unregister(self.owner)
                yield self.options.orphan_grace
            *lines, self.received = (self.received + chunk).split(b"\n")
            yield from map(float, lines)
        if self.signals in ready and set(os.read(self.signals, 256)) - {signal.SIGCHLD}:
            yield self.options.orphan_grace


def watch_signals() -> int:
    """Return a descriptor that receives the number of each signal as a byte."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


def report(owner: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the owner is gone; end of file reports that as well
        owner.sendall(f"{number}\n".encode())


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lifeline", type=int, required=True)
    parser.add_argument("--stop-signal", type=int, required=True)
    parser.add_argument("--stop-tree", action="store_true", help="signal every process to stop")
    parser.add_argument("--orphan-grace", type=float, default=0.0)
    parser.add_argument("--detach", action="store_true", help="be no child of the owner")
    parser.add_argument("--uid", type=int)
    parser.add_argument("--gid", type=int)
    parser.add_argument("program", nargs="+")
    options = parser.parse_args(arguments)
    if options.detach and os.fork():
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the owner's thread may have blocked some
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    owner = socket.socket(fileno=options.lifeline)
    owner.set_inheritable(False)  # only the guard keeps the owner's socket
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, the kernel would drop return codes
    tree = Tree(spawn(options))
    signals = watch_signals()  # after the fork: the program starts with the default handlers
    report(owner, tree.program)
    try:
        Guard(tree, owner, signals, options).run()
    except PermissionError as refused:
        sys.exit(f"may not end processes of other accounts: {refused}")
    if tree.returncode is not None:
        report(owner, tree.returncode)
    code = tree.returncode or 0
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main(sys.argv[1:])
