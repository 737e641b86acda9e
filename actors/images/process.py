"""A sandboxed process that reads and writes pictures one after another.

Run it as `python -m actors.images.process LIMITS`, with one end of a stream socket as standard
input. It sends a message when it is ready, then one answer for each request
(`actors.images.messages`). A request to read has an additional first answer: the number of pixels,
sent when the file's header is accepted, so that the owner can set a time limit. End of file ends
the process.

| Request | Parts | Answer | Parts |
|---|---|---|---|
| `examine` | upload | `type`, `width`, `height` | |
| `prepare`: `keep_metadata`, `on_white` | upload | the same, `grey`, `alpha` | input, alpha, EXIF |
| `encode`: `format`, `quality`, `grey`, `pixels`, `alpha`, `raw` | PNG, alpha, EXIF | | the file |

`alpha` is the shape of the alpha channel or null. With `raw`, the shape of raw pixels, an open file
of them is sent with the request instead of the PNG. A missing part has no bytes. A failed request
is answered with `refused` (an error's code, with `message` and `details`), `exhausted` if memory
ran out, or `failed` if a picture could not be written.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import resource
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actors.images.encode import encode, engine_input
from actors.images.messages import SIZE, frame, header_size, parse_header
from actors.images.reader import NormalisedImage, load_decoders, read
from actors.images.sandbox import (
    address_space_bytes,
    limit_cpu,
    limit_memory,
    lock_down,
)
from restoration.errors import InvalidRequest
from restoration.images import MEBIBYTE, UploadLimits
from restoration.jobs import OutputFormat
from restoration.processes.guard import die_with_parent

Answer = tuple[dict[str, Any], Sequence[bytes]]

_STANDARD_INPUT, _STANDARD_ERROR = 0, 2
_HEADER_CPU_S = 2.0
# Address space for each pixel, in bytes, in addition to that of the idle process. Reading holds 16
# bits or floats temporarily; libwebp holds 8 bytes beside its input and output.
_READ_BYTES_A_PIXEL = 48
_ENCODE_BYTES_A_PIXEL = 24
_SPARE_BYTES = 128 * MEBIBYTE


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """Limits for one picture. `cpu_s`: CPU seconds for a picture of the largest accepted size."""

    upload: UploadLimits
    cpu_s: float

    def cpu_s_for(self, pixels: int) -> float:
        """Return the CPU time limit for a picture of `pixels` pixels, in seconds."""
        return _HEADER_CPU_S + self.cpu_s * pixels / self.upload.max_pixels

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> ProcessLimits:
        fields = json.loads(text)
        return cls(UploadLimits(**fields["upload"]), fields["cpu_s"])


class ImageProcess:
    """Answers the owner's requests on `connection`. `read_image`: `actors.images.reader.read`."""

    def __init__(
        self,
        connection: socket.socket,
        limits: ProcessLimits,
        read_image: Callable[..., NormalisedImage] = read,
    ) -> None:
        self._connection = connection
        self._limits = limits
        self._read_image = read_image
        self._base_bytes = 0

    def run(self) -> None:
        """Lock the process down, then answer requests until end of file."""
        _load_everything()
        self._base_bytes = address_space_bytes()
        lock_down()
        self._send({"ready": True})
        while (request := self._receive()) is not None:
            try:
                self._send(*self._answer(*request))
            except InvalidRequest as error:
                refusal = {"message": error.message, "details": error.details}
                self._send({"refused": error.code, **refusal})
            except MemoryError:
                self._send({"exhausted": True})
            del request  # frees the picture before the wait for the next

    def _answer(
        self, header: dict[str, Any], parts: Sequence[bytes], pixels: NDArray[np.uint8] | None
    ) -> Answer:
        match header["do"]:
            case "examine":
                return asdict(self._read(parts[0], keep_metadata=False).info), []
            case "prepare":
                return self._prepare(header, *parts)
            case _:
                return self._encode(header, parts[0] if pixels is None else pixels, *parts[1:])

    def _read(self, data: bytes, *, keep_metadata: bool) -> NormalisedImage:
        def on_size(width: int, height: int) -> None:
            limit_cpu(self._limits.cpu_s_for(width * height))
            self._send({"pixels": width * height})

        upload = self._limits.upload
        limit_cpu(self._limits.cpu_s_for(0))
        self._limit_memory(len(data) + _READ_BYTES_A_PIXEL * upload.max_pixels)
        return self._read_image(data, upload, keep_metadata=keep_metadata, on_size=on_size)

    def _prepare(self, header: dict[str, Any], data: bytes) -> Answer:
        image = self._read(data, keep_metadata=header["keep_metadata"])
        file, alpha = engine_input(image, on_white=header["on_white"])
        shape = None if alpha is None else alpha.shape
        answer = {**asdict(image.info), "grey": image.is_grey, "alpha": shape}
        return answer, [file, b"" if alpha is None else alpha.tobytes(), image.exif or b""]

    def _encode(
        self, header: dict[str, Any], picture: bytes | NDArray[np.uint8], alpha: bytes, exif: bytes
    ) -> Answer:
        limit_cpu(self._limits.cpu_s_for(header["pixels"]))
        self._limit_memory(_ENCODE_BYTES_A_PIXEL * header["pixels"])
        try:
            data = encode(
                picture,
                OutputFormat(header["format"]),
                header["quality"],
                np.frombuffer(alpha, np.uint8).reshape(header["alpha"]) if alpha else None,
                exif or None,
                grey=header["grey"],
            )
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 # reported to the owner
            return {"failed": f"{type(error).__name__}: {error}"}, []
        return {}, [data]

    def _limit_memory(self, size_bytes: int) -> None:
        limit_memory(self._base_bytes + _SPARE_BYTES + size_bytes)

    def _send(self, header: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
        self._connection.sendall(frame(header, parts))
        for part in parts:
            self._connection.sendall(part)

    def _receive(self) -> tuple[dict[str, Any], Sequence[bytes], NDArray[np.uint8] | None] | None:
        """Return the next request's header, parts and raw pixels, or None at end of file."""
        limit_memory(resource.RLIM_INFINITY)  # the owner bounds what it sends
        prefix, files, _, _ = socket.recv_fds(self._connection, SIZE.size, 1)
        if not prefix:
            return None
        header, sizes = parse_header(self._exactly(header_size(prefix)), sys.maxsize)
        parts = [self._exactly(size) for size in sizes]
        if not files:
            return header, parts, None
        view = mmap.mmap(files[0], math.prod(header["raw"]), access=mmap.ACCESS_READ)
        os.close(files[0])
        return header, parts, np.frombuffer(view, np.uint8).reshape(header["raw"])

    def _exactly(self, size: int) -> bytes:
        data, filled = bytearray(size), 0
        while filled < size:
            got = self._connection.recv_into(memoryview(data)[filled:])
            if not got:
                raise EOFError(
                    "the parent process closed the connection in the middle of a request"
                )
            filled += got
        return bytes(data)


def _load_everything() -> None:
    """Trigger all lazy imports by reading and writing a small picture of each type.

    After `lock_down` no file can be opened.
    """
    load_decoders()
    sample = Image.new("RGB", (8, 8))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF"):
        file = BytesIO()
        sample.save(file, kind)
        image = read(file.getvalue(), UploadLimits())
        engine_input(image, on_white=False)
    for wanted in OutputFormat:
        encode(np.zeros((8, 8, 3), np.uint8), wanted, 90, np.zeros((8, 8), np.uint8))


def main(read_image: Callable[..., NormalisedImage] = read) -> None:
    """Run an image process: the first argument has the limits, standard input is the socket."""
    die_with_parent()
    warnings.simplefilter("ignore")
    with open(os.devnull, "wb") as nowhere:  # libraries print messages that files can influence
        os.dup2(nowhere.fileno(), _STANDARD_ERROR)
    connection = socket.socket(fileno=_STANDARD_INPUT)
    ImageProcess(connection, ProcessLimits.load(sys.argv[1]), read_image).run()


if __name__ == "__main__":
    main()
