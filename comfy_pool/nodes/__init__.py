"""Custom node pack that an owned engine loads.

The node ComfyRestoreHandOver replaces SaveImage. SaveImage compresses a PNG on the thread that
feeds the GPU, which takes longer than a GPU needs for a large picture. This node writes the
uncompressed pixels to a file in shared memory, where the engine's owner reads them.

The pack also makes garbage collection cheaper and rejects foreign requests (see `loopback`). Each
feature is enabled by an environment variable; without them the pack does nothing on its own.
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
    """Output node that writes one image as rows of 8-bit channels, without a header."""

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = "comfy-restore"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",), "name": ("STRING", {"default": ""})}}

    def run(self, images: Any, name: str) -> dict[str, Any]:
        """Write the image to the file `name` in the folder that `FOLDER_VARIABLE` names.

        Return the file's name, width, height and channels as the node's UI output. Raises
        ValueError unless there is exactly one image and `name` is a plain file name, and
        MemoryError if the file cannot be written.
        """
        if len(images) != 1:
            raise ValueError(f"expected one image, got {len(images)}")
        if name != os.path.basename(name):
            raise ValueError(f"{name!r} is not a plain file name")
        pixels = images[0].cpu().numpy()
        try:
            _write(os.path.join(os.environ[FOLDER_VARIABLE], name), pixels)
        except OSError as error:
            raise MemoryError(
                f"cannot allocate shared memory for the result: {error.strerror}"
            ) from error
        height, width, channels = pixels.shape
        output = {"name": name, "width": width, "height": height, "channels": channels}
        return {"ui": {"pixels": [output]}}


def _write(path: str, pixels: Any) -> None:
    """Write the values as SaveImage converts them: times 255, clipped, truncated to 8 bits."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Writing to a mapped page without memory behind it would kill this process (SIGBUS).
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, pixels.size)
        else:
            os.ftruncate(file, pixels.size)
        with mmap.mmap(file, pixels.size) as memory:
            target = np.frombuffer(memory, np.uint8).reshape(pixels.shape)
            for first in range(0, len(pixels), _BAND_ROWS):
                band = np.clip(255.0 * pixels[first : first + _BAND_ROWS], 0, 255)
                with np.errstate(invalid="ignore"):  # NaN has no 8-bit value
                    target[first : first + _BAND_ROWS] = band
            del target  # a view would keep the memory from being unmapped
    finally:
        os.close(file)


if FOLDER_VARIABLE in os.environ:
    # Exempt all loaded objects from garbage collection. PyTorch and ComfyUI make about half a
    # million. Every ten seconds ComfyUI runs a full collection on the thread that feeds the GPU,
    # which took a quarter of a second.
    gc.collect()
    gc.freeze()
if loopback.VARIABLE in os.environ:
    loopback.guard_prompt_server()

NODE_CLASS_MAPPINGS = {"ComfyRestoreHandOver": ComfyRestoreHandOver}
