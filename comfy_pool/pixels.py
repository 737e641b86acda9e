"""Our side of `comfy_pool.nodes`: a folder in shared memory, and the node in SaveImage's place.

A result's file belongs to the run that it is named after until the run is over, then to whoever
took the result. What a worker that was killed leaves behind goes when the next one has its slot.
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
_ENOUGH_BYTES = 2**30  # three results of 100 megapixels; containers often have 64 MB


@contextlib.contextmanager
def pixels_folder(name: str, otherwise: Path) -> Iterator[Path]:
    """An empty folder for the engine of that name, removed at the end.

    It lies in memory, or below the folder `otherwise` where there is not enough of it. Nobody
    else may use that name on this machine meanwhile.
    """
    prefix = f"comfy-restore-{name}-"
    with contextlib.suppress(OSError):
        _sweep(_MEMORY, prefix)
    _sweep(otherwise, prefix)
    parent = _MEMORY if _has_room(_MEMORY) else otherwise
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as path:
        yield Path(path)


def bound(prompt: Prompt, node: str, name: str) -> Prompt:
    """The prompt with the hand-over in place of its SaveImage; one that has none stays."""
    saver = prompt[node]
    if saver["class_type"] != "SaveImage":
        return prompt
    inputs = {"images": saver["inputs"]["images"], "name": name}
    return {**prompt, node: {"class_type": "ComfyRestoreHandOver", "inputs": inputs}}


def taken(told: HandedOver, path: Path) -> Pixels:
    """The result in the file `path`. Raises EngineFailed if that is not what the node told of."""
    pixels = Pixels(path, told.width, told.height, told.channels)
    size_bytes = told.width * told.height * told.channels
    if told.name != path.name or not path.is_file() or path.stat().st_size != size_bytes:
        raise EngineFailed("the engine handed over other pixels than this run's", name=told.name)
    return pixels


def _has_room(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free >= _ENOUGH_BYTES
    except OSError:  # not on this system
        return False


def _sweep(folder: Path, prefix: str) -> None:
    for path in folder.glob(prefix + "*"):
        if path.lstat().st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)
