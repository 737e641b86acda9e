"""One decoder: a process that examines pictures one after another, and that may be lost.

`python -m actors.decoder ALLOWANCE`, with one end of a stream socket as standard input. It says
READY once; then a request is the picture's size (8 bytes, big-endian) and its bytes, and the answer
one line of JSON. End of file ends the process, and so does the end of the thread that started it.
It is given nothing to steal: no secret in its environment, no file that it may write; only memory
and time for one picture.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import FileIO

from actors.images.reader import ImageInfo, examine
from restoration.errors import InvalidRequest
from restoration.images import UploadLimits

READY = b"\n"
SIZE = struct.Struct(">Q")

_PR_SET_PDEATHSIG = 1
_INPUT, _ERRORS = 0, 2

Examine = Callable[[bytes, UploadLimits], ImageInfo]


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a decoder may use: `memory_bytes` of address space, `cpu_s` of time for a picture."""

    upload: UploadLimits
    memory_bytes: int
    cpu_s: int

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Allowance:
        fields = json.loads(text)
        return cls(**{**fields, "upload": UploadLimits(**fields["upload"])})


def serve(allowance: Allowance, look: Examine = examine) -> None:
    """Answer requests until there are no more."""
    _lock_up(allowance)
    with open(_INPUT, "r+b", buffering=0, closefd=False) as line:
        line.write(READY)
        while header := _read(line, SIZE.size):
            picture = _read(line, *SIZE.unpack(header))
            _extend_time(allowance.cpu_s)
            line.write(json.dumps(_answer(picture, allowance.upload, look)).encode() + b"\n")


def _answer(data: bytes, limits: UploadLimits, look: Examine) -> dict[str, object]:
    try:
        return {"picture": asdict(look(data, limits))}
    except InvalidRequest as error:
        return {"refused": error.code, "message": error.message, "details": error.details}
    except MemoryError:
        return {"exhausted": True}


def _read(line: FileIO, size: int) -> bytes:
    """So many bytes, or fewer at the end of file."""
    data, filled = bytearray(size), 0
    while filled < size and (got := line.readinto(memoryview(data)[filled:])):
        filled += got
    return bytes(data[:filled])


def _lock_up(allowance: Allowance) -> None:
    """Die with the owner, and have nothing but what is allowed."""
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError("prctl(PR_SET_PDEATHSIG) was refused")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's
    with open(os.devnull, "wb") as nowhere:  # libraries write there what files tell them to
        os.dup2(nowhere.fileno(), _ERRORS)
    for name, limit in (
        (resource.RLIMIT_AS, allowance.memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),  # a core would hold somebody's photo
    ):
        resource.setrlimit(name, (limit, limit))


def _extend_time(seconds: int) -> None:
    """The kernel ends the process (SIGXCPU) after so much more time on a processor."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(time.process_time()) + seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


if __name__ == "__main__":
    serve(Allowance.load(sys.argv[1]))
