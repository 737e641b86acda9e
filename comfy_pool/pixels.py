"""Receive the pixels that `comfy_pool.nodes` writes to shared memory instead of a saved file.

A result's file is named after its run. The run owns it until the result is returned, then the
caller does. Files left by a killed worker are deleted when its slot is used again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from comfy_pool.protocol.responses import HandedOver
from restoration.engine_port import Pixels, Prompt
from restoration.errors import EngineFailed

NODES = Path(__file__).with_name("nodes")

_MEMORY = Path("/dev/shm")  # noqa: S108 - the folders in it are made by mkdtemp
_ENOUGH_BYTES = 2**30  # three results of 100 megapixels; containers often have only 64 MB


@contextlib.contextmanager
def pixels_folder(name: str, otherwise: Path) -> Iterator[Path]:
    """Yield an empty folder for the engine called `name`, and remove it on exit.

    The folder is in shared memory if 1 GiB is free there, otherwise in `otherwise`. `name` must be
    unique on this machine: folders left by an earlier engine of that name are deleted.
    """
    prefix = f"comfy-restore-{name}-"
    with contextlib.suppress(OSError):
        _sweep(_MEMORY, prefix)
    _sweep(otherwise, prefix)
    parent = otherwise
    with contextlib.suppress(OSError):  # not on this system
        if shutil.disk_usage(_MEMORY).free >= _ENOUGH_BYTES:
            parent = _MEMORY
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as path:
        yield Path(path)


def with_hand_over(prompt: Prompt, node: str, name: str) -> Prompt:
    """Return the prompt with its SaveImage `node` replaced by the node that hands over pixels.

    `name` is the file to write. A prompt whose `node` is no SaveImage is returned unchanged.
    """
    saver = prompt[node]
    if saver["class_type"] != "SaveImage":
        return prompt
    inputs = {"images": saver["inputs"]["images"], "name": name}
    return {**prompt, node: {"class_type": "ComfyRestoreHandOver", "inputs": inputs}}


def read_hand_over(output: HandedOver, path: Path) -> Pixels:
    """Return the result in the file `path`.

    Raises EngineFailed unless the file's name and size match what the node reported.
    """
    pixels = Pixels(path, output.width, output.height, output.channels)
    size_bytes = output.width * output.height * output.channels
    if output.name != path.name or not path.is_file() or path.stat().st_size != size_bytes:
        raise EngineFailed("the engine returned pixels of another run", name=output.name)
    return pixels


def _sweep(folder: Path, prefix: str) -> None:
    for path in folder.glob(prefix + "*"):
        if path.lstat().st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)
