"""What ComfyUI loads, from its folder of custom nodes, when the engine is ours.

A node that hands pixels over instead of writing a file of them: SaveImage compresses a PNG on the
thread that keeps the GPU busy, for longer than a GPU takes to make a large picture. This one writes
the same pixels, as they are, to a file in shared memory and returns; whoever started the engine
takes them from there. Then a lighter garbage collection, and a server for this machine alone. Each
of these is for whoever sets its variable: in any other ComfyUI the pack changes nothing.
"""

import gc
import mmap
import os
from typing import Any

import numpy as np

from . import loopback

FOLDER_VARIABLE = "COMFY_RESTORE_PIXELS"

_BAND_ROWS = 64  # converted at a time, so that the intermediate values stay in the cache


class ComfyRestoreHandOver:
    """In place of SaveImage for one image: rows of 8-bit channels, without any header."""

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = "comfy-restore"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",), "name": ("STRING", {"default": ""})}}

    def run(self, images: Any, name: str) -> dict[str, Any]:
        """`name` is the file's in the folder that the environment names."""
        if len(images) != 1:
            raise ValueError(f"{len(images)} pictures came where one was expected")
        if name != os.path.basename(name):
            raise ValueError(f"{name!r} is no plain file name")
        pixels = images[0].cpu().numpy()
        try:
            _write(os.path.join(os.environ[FOLDER_VARIABLE], name), pixels)
        except OSError as error:
            raise MemoryError(f"no shared memory for the result: {error.strerror}") from error
        height, width, channels = pixels.shape
        told = {"name": name, "width": width, "height": height, "channels": channels}
        return {"ui": {"pixels": [told]}}


def _write(path: str, pixels: Any) -> None:
    """The values as SaveImage rounds them: 255 times, cut off at both ends, towards zero."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # A mapped page for which there is no memory would kill this process.
        _allocate(file, pixels.size)
        with mmap.mmap(file, pixels.size) as memory:
            target = np.frombuffer(memory, np.uint8).reshape(pixels.shape)
            for first in range(0, len(pixels), _BAND_ROWS):
                band = np.clip(255.0 * pixels[first : first + _BAND_ROWS], 0, 255)
                with np.errstate(invalid="ignore"):  # NaN has no place among bytes
                    target[first : first + _BAND_ROWS] = band
            del target  # or the memory could not be unmapped
    finally:
        os.close(file)


def _allocate(file: int, size_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size_bytes)
    else:
        os.ftruncate(file, size_bytes)


def _spare_what_is_loaded() -> None:
    """Let garbage collections pass over all that there is by now: PyTorch and ComfyUI themselves,
    half a million objects. Every ten seconds ComfyUI has everything looked through on the thread
    that keeps the GPU busy, which took a quarter of a second."""
    gc.collect()
    gc.freeze()


if FOLDER_VARIABLE in os.environ:
    _spare_what_is_loaded()
if loopback.VARIABLE in os.environ:
    loopback.guard_prompt_server()

NODE_CLASS_MAPPINGS = {"ComfyRestoreHandOver": ComfyRestoreHandOver}
