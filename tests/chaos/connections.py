"""Break a TCP connection between two other processes, as a network would.

The kernel copies the descriptor of one end into this process (pidfd_getfd(2), Linux 5.6); shutting
the copy down ends the connection for both. This needs the right to trace the process: root, or the
same user where Yama does not forbid it.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
from pathlib import Path

from tests.support.stack_processes import Process

_SYS_PIDFD_GETFD = 438  # the same on every architecture
_ESTABLISHED = "01"
_SOCKET = re.compile(r"socket:\[(\d+)\]")
_libc = ctypes.CDLL(None, use_errno=True)


def drop_connections(server: Process, port: int) -> int:
    """Break every connection that `server` has accepted on `port` of 127.0.0.1; return their
    number.

    Raises OSError if the kernel refuses.
    """
    inodes = _accepted(port)
    sockets = {
        descriptor
        for descriptor, target in server.open_files().items()
        if (match := _SOCKET.match(target)) and match[1] in inodes
    }
    for descriptor in sockets:
        _shut_down(server.pid, descriptor)
    return len(sockets)


def _accepted(port: int) -> set[str]:
    """Return the inodes of the established sockets with local port `port`, from /proc/net/tcp."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    suffix = f":{port:04X}"
    return {row[9] for row in rows if row[1].endswith(suffix) and row[3] == _ESTABLISHED}


def _shut_down(pid: int, descriptor: int) -> None:
    handle = os.pidfd_open(pid)
    try:
        copy = _libc.syscall(_SYS_PIDFD_GETFD, handle, descriptor, 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd was refused")
    finally:
        os.close(handle)
    with socket.socket(fileno=copy) as borrowed:
        borrowed.shutdown(socket.SHUT_RDWR)
