"""Permissions of photos' files during their jobs, as seen by another account of the machine."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from tests.support.photos import degrade, jpeg, original
from tests.support.stack import Stack

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at only


def _files(stack: Stack) -> Iterator[tuple[Path, int]]:
    """Yield each file and folder of the stack's engines with its mode; links have no mode of their
    own."""
    roots = [stack.state_dir / "engines", *SHARED_MEMORY.glob("comfy-restore-*")]
    for root in roots:
        for path in (root, *root.rglob("*")):
            try:
                status = path.lstat()
            except FileNotFoundError:  # was deleted meanwhile
                continue
            if not stat.S_ISLNK(status.st_mode):
                yield path, stat.S_IMODE(status.st_mode)


def test_photos_in_flight_are_for_their_account_alone(stack: Stack) -> None:
    """All files that engines and workers write, in folders and in shared memory, are private."""
    seen: dict[Path, int] = {}
    photo = jpeg(degrade(original("china")))
    with stack.client() as client:
        while not any(path.name.startswith("input.") for path in seen):
            job = client.submit(photo, workflow="enlarge")
            while not client.get(job.id).status.is_final:
                seen.update(_files(stack))
    assert {oct(mode) for mode in seen.values() if mode & 0o077} == set(), seen
    assert {"engine.log", "comfyui.db"} <= {path.name for path in seen}
