"""Messages between an image process and its owner: a JSON header and binary parts. No I/O.

A message is the header's size (4 bytes, big-endian), the header, and the parts in order. The
header's key `sizes` lists the sizes of the parts in bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

SIZE = struct.Struct(">I")
MAX_HEADER_BYTES = 64 * 1024


def frame(header: Mapping[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    """Return the bytes to send before the `parts`: the header with its size."""
    text = json.dumps({**header, "sizes": [len(part) for part in parts]}).encode()
    return SIZE.pack(len(text)) + text


def header_size(prefix: bytes) -> int:
    """Return the header's size in bytes. Raises ValueError above MAX_HEADER_BYTES."""
    (size,) = SIZE.unpack(prefix)
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"the header has {size} bytes; the maximum is {MAX_HEADER_BYTES}")
    return int(size)


def parse_header(text: bytes, max_bytes: int) -> tuple[dict[str, Any], list[int]]:
    """Return the header and the sizes of the parts.

    Raises ValueError for an invalid header, or parts of more than `max_bytes` in total.
    """
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("the header must be an object")
    sizes = header.pop("sizes", None)
    if not isinstance(sizes, list) or not all(
        isinstance(size, int) and size >= 0 for size in sizes
    ):
        raise ValueError("the header must list the sizes of the parts")
    if sum(sizes) > max_bytes:
        raise ValueError(f"the parts have {sum(sizes)} bytes; the maximum is {max_bytes}")
    return header, sizes
