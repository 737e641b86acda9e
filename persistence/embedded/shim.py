"""Launcher that execs a server which cannot outlive its parent.

It switches to the wanted account, arranges to be killed with the parent, checks that the parent
still runs, and then execs. It is run by its path with the standard library only, which takes 20 ms;
`-m` would import the packages around it as root.
"""

from __future__ import annotations

import argparse
import ctypes  # before setuid, because the other account may be unable to read the interpreter
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persistence.embedded.service import Account

PR_SET_PDEATHSIG = 1  # linux/prctl.h
HAS_PDEATHSIG = sys.platform == "linux"


def command(
    argv: Sequence[str], run_as: Account | None = None, lifeline: int | None = None
) -> list[str]:
    """Return the command line that runs `argv` as a child bound to this process.

    On Linux the kernel kills the child when the thread that started it ends, so start it from a
    thread that keeps running. On other systems pass `lifeline`, the read end of a pipe whose write
    end only this process holds: the server is killed at its end of file.
    """
    options = ["--parent", str(os.getpid())]
    if run_as is not None:
        options += ["--uid", str(run_as.uid), "--gid", str(run_as.gid)]
    if lifeline is not None:
        options += ["--lifeline", str(lifeline)]
    return [sys.executable, "-I", "-S", __file__, *options, "--", *argv]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--uid", type=int)
    parser.add_argument("--gid", type=int)
    parser.add_argument("--lifeline", type=int)
    parser.add_argument("argv", nargs="+")
    options = parser.parse_args(arguments)
    for ignorable in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        # A supervisor in a shell's background ignores SIGINT, and its children would inherit that.
        signal.signal(ignorable, signal.SIG_DFL)
    if options.uid is not None:
        os.setgroups([])
        os.setgid(options.gid)
        os.setuid(options.uid)
    if options.lifeline is not None:
        _die_at_end_of_file(options.lifeline)
    elif HAS_PDEATHSIG:
        _die_with_parent()  # after setuid, which clears the setting
    if os.getppid() != options.parent:
        sys.exit("the supervisor ended before its server could start")
    os.umask(0o077)
    os.execvp(options.argv[0], options.argv)  # noqa: S606 - no shell is the point


def _die_with_parent() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def _die_at_end_of_file(lifeline: int) -> None:
    """Fork a watcher, as a child of the future server, which kills the server at end of file."""
    server = os.getpid()
    if os.fork() != 0:
        os.close(lifeline)
        return
    os.setsid()  # leave the server's group, which the supervisor kills
    os.read(lifeline, 1)
    if os.getppid() == server:  # otherwise it has ended, and its pid may be another process's
        os.kill(server, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
