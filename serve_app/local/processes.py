"""Find and end the processes of one local stack, and of no other.

`restore up` marks its environment with its state folder, and every process it starts inherits the
mark. Some processes of Ray and Postgres overwrite their environment with a title; those are
recognised by their open files. No process is ever recognised by its name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from restoration.errors import DependencyUnavailable
from restoration.settings import STACK_MARK

KILLED_S = 10.0  # for the kernel to end a killed process
_RESCAN_S = 1.0
_POLL_S = 0.05


def mark(state_dir: Path) -> dict[str, str]:
    """Return the environment variable that marks the processes of this folder's stack."""
    return {STACK_MARK: str(state_dir.resolve())}


def processes_of(state_dir: Path, ray_session: Path | None = None) -> list[psutil.Process]:
    """Return the living processes of this folder's stack, without this process and its ancestors.

    `ray_session` is the folder of Ray's files, if the stack has started Ray.
    """
    state_dir = state_dir.resolve()
    folders = [state_dir] if ray_session is None else [state_dir, ray_session.resolve()]
    ended = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    processes = psutil.process_iter(["ppid", "status", "environ"])
    living = [each for each in processes if each.info["status"] not in ended]
    found = [each for each in living if _is_marked(each, state_dir, folders)]
    pids = {each.pid for each in found}
    for parent in found:  # `found` grows meanwhile
        below = [
            each for each in living if each.info["ppid"] == parent.pid and each.pid not in pids
        ]
        pids.update(each.pid for each in below)
        found += below
    me = psutil.Process()
    own = {each.pid for each in [me, *me.parents()]}
    return [each for each in found if each.pid not in own]


def orphans_of(state_dir: Path, ray_session: Path | None = None) -> list[psutil.Process]:
    """Return the stack's processes that do not descend from this process."""
    below = set(psutil.Process().children(recursive=True))
    return [each for each in processes_of(state_dir, ray_session) if each not in below]


def end_all(find: Callable[[], list[psutil.Process]]) -> bool:
    """Kill the processes that `find` returns until it returns none; return whether there were any.

    Raises DependencyUnavailable if the kernel does not end a process within KILLED_S.
    """
    deadline = time.monotonic() + KILLED_S
    any_found = False
    while found := find():
        if time.monotonic() > deadline:
            pids = ", ".join(str(each.pid) for each in found)
            raise DependencyUnavailable(f"cannot end these processes of the stack: {pids}")
        any_found = True
        for each in found:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        wait_for_end(found, _RESCAN_S)
    return any_found


def wait_for_end(processes: Iterable[psutil.Process], timeout_s: float) -> None:
    """Return when none of the processes is running, or after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while any(is_alive(each) for each in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def is_alive(process: psutil.Process) -> bool:
    """Return whether the process is running; a zombie is not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _is_marked(process: psutil.Process, state_dir: Path, folders: list[Path]) -> bool:
    environ: dict[str, str] | None = process.info["environ"]
    if environ is None:  # it belongs to another user
        return False
    if environ:
        return environ.get(STACK_MARK) == str(state_dir)
    try:
        files = [process.cwd(), *(file.path for file in process.open_files())]
    except psutil.Error:
        return False
    return any(Path(file).is_relative_to(folder) for file in files for folder in folders)
