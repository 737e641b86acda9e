"""An image process that misbehaves as the bytes after a picture's BMP signature ask."""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from actors.images.process import main
from actors.images.reader import NormalisedImage, read
from restoration.errors import BrokenImage
from restoration.images import UploadLimits

FORBIDDEN: dict[str, Callable[[], object]] = {
    "open": lambda: open("/etc/hostname", "rb"),
    "write": lambda: open("/tmp/written-by-a-picture", "wb"),  # noqa: S108
    "unlink": lambda: os.unlink("/tmp/kept"),  # noqa: S108
    "socket": socket.socket,
    "pair": socket.socketpair,
    "exec": lambda: os.execv(sys.executable, [sys.executable, "-V"]),  # noqa: S606
    "fork": os.fork,
    "signal": lambda: os.kill(os.getppid(), 0),
    "limit": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU),
}


def misbehave(data: bytes, limits: UploadLimits, **options: Any) -> NormalisedImage:
    """Misbehave if the picture asks for it, else read it normally."""
    deed = data[2:].decode("latin-1")
    match deed:
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(3)
        case "hang":
            threading.Event().wait()
        case "spin":
            while True:
                pass
        case "large":
            options["on_size"](4000, 4000)
            while True:
                pass
        case "hoard":
            hoard = [b""]
            while True:
                hoard.append(bytes(1 << 20))
        case "babble":
            os.write(0, b"\0\0\0\2{}")
        case "boast":
            os.write(0, b'\0\0\0\x1d{"sizes": [99999999999999999]}')
        case "flood":
            while True:
                os.write(0, b"x" * 4096)
        case _ if deed in FORBIDDEN:
            try:
                FORBIDDEN[deed]()
            except OSError as error:
                raise BrokenImage(f"{deed}: {error}") from error
    return read(data, limits, **options)


if __name__ == "__main__":
    main(misbehave)
