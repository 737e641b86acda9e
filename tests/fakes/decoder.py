"""A decoder that does what a picture's first bytes after the signature of a BMP tell it to."""

from __future__ import annotations

import os
import signal
import sys
import threading

from actors.decoder import Allowance, serve
from actors.images.reader import ImageInfo, examine
from restoration.images import UploadLimits


def misbehave(data: bytes, limits: UploadLimits) -> ImageInfo:
    """A real decoder for real pictures."""
    match data[2:].decode("latin-1"):
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "hang":
            threading.Event().wait()
        case "spin":
            while True:
                pass
        case "hoard":
            hoard = [b""]
            while True:
                hoard.append(bytes(1 << 20))
        case "babble":
            os.write(0, b'{"picture": {"type": "text/html"}}\n')
        case "flood":
            while True:
                os.write(0, b"x" * 4096)
        case "write":
            with open("/tmp/decoder-wrote-this", "wb") as file:  # noqa: S108 - it cannot
                file.write(b"x")
    return examine(data, limits)


if __name__ == "__main__":
    serve(Allowance.load(sys.argv[1]), misbehave)
