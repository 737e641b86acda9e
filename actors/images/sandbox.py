"""Limits for a process that reads untrusted pictures: CPU time, memory, and system calls.

On Linux a seccomp filter allows the system calls for computation and for sockets that are already
open. All others fail with EPERM, so the process cannot open files, create sockets, start programs
or signal processes, and must import its modules before `lock_down`.

The filter is built by hand as `seccomp(2)` describes, because there is no wheel of libseccomp.
Except on Linux on x86-64 and ARM64 only the limits of CPU time and memory apply.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import signal
import struct
import sys
import time

from restoration.processes.guard import prctl

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x00010000

# Operations of classic BPF, and offsets in `struct seccomp_data`.
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_INSTRUCTION = struct.Struct("@HBBI")  # operation, jump if true, jump if false, operand

# AUDIT_ARCH_* of <linux/audit.h>, by `platform.machine()`.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Numbers of the allowed system calls on (x86-64, ARM64).
_ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "sendto": (44, 206),
    "sendmsg": (46, 211),
    "ppoll": (271, 73),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "fcntl": (72, 25),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "futex": (202, 98),
    "rseq": (334, 293),
    "set_robust_list": (273, 99),
    "membarrier": (324, 283),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getcpu": (309, 168),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "setrlimit": (160, 164),
    "getrandom": (318, 278),
    "sysinfo": (99, 179),
}
# `clone` may only create threads. A filter cannot read the flags of `clone3`, so it fails with
# ENOSYS and libc falls back to `clone`. `prlimit64` may only be for the process itself.
_CLONE, _CLONE3, _PRLIMIT64 = (56, 220), (435, 435), (302, 261)


class _Program(ctypes.Structure):
    """`struct sock_fprog` of <linux/filter.h>."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def lock_down() -> None:
    """Restrict this process to computation and its open files, irrevocably. Raises OSError."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner handles Ctrl-C in a terminal
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would contain a user's photo
    prctl(_PR_SET_DUMPABLE, 0)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if sys.platform == "linux" and platform.machine() in _ARCHITECTURES:
        code = _filter(platform.machine())
        program = _Program(len(code) // _INSTRUCTION.size, code)
        prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def limit_cpu(seconds: float) -> None:
    """Make the kernel end the process (SIGXCPU) after `seconds` further seconds of CPU time."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), hard))


def limit_memory(size_bytes: int) -> None:
    """Limit the address space to `size_bytes`; allocations beyond it fail."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, hard))


def address_space_bytes() -> int:
    """Return the current size of the address space. Opens a file: call it before `lock_down`."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _filter(machine: str) -> bytes:
    """Return the BPF program. System calls of another architecture fail with EPERM too."""
    column = list(_ARCHITECTURES).index(machine)
    clone, clone3, prlimit64 = _CLONE[column], _CLONE3[column], _PRLIMIT64[column]
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_IF_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _FAIL | _EPERM),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_IF_EQUAL, 0, 1, clone3),
        (_RETURN, 0, 0, _FAIL | _ENOSYS),
        (_JUMP_IF_EQUAL, 0, 4, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_JUMP_IF_ANY_BIT, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _FAIL | _EPERM),
        (_JUMP_IF_EQUAL, 0, 4, prlimit64),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_JUMP_IF_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _FAIL | _EPERM),
    ]
    for numbers in _ALLOWED.values():
        code += [(_JUMP_IF_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _FAIL | _EPERM))
    return b"".join(_INSTRUCTION.pack(*each) for each in code)
