"""The state folder: one holder, private files, persistent choices."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from persistence.embedded.state import (
    PAIR_OFFSET,
    PAIRED_PORTS,
    PORTS,
    StateDir,
    holder_of,
    write_private,
)
from restoration.errors import SetupError


def any_port(port: int) -> bool:
    return True


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_choices_stay(tmp_path: Path) -> None:
    """A choice is found again, however much is reserved later."""
    with StateDir.locked(tmp_path / "state", any_port) as state:
        state.reserve(ports=["a", "b"], paired_ports=["c"], secrets_for=["a"])
        before = [state.port("a"), state.port("b"), state.port("c"), state.secret("a")]
    with StateDir.locked(tmp_path / "state", any_port) as state:
        state.reserve(ports=["b", "d", "a"], paired_ports=["c"], secrets_for=["z", "a"])
        assert before == [state.port("a"), state.port("b"), state.port("c"), state.secret("a")]


def test_only_the_owner_reads_the_secrets(tmp_path: Path) -> None:
    """The state file, the lock and every folder in the state folder are closed to others."""
    with StateDir.locked(tmp_path / "state", any_port) as state:
        state.reserve(secrets_for=["a"])
        private = [state.folder("sub"), state.log_path("x").parent]
        assert mode(tmp_path / "state") == (0o711 if os.geteuid() == 0 else 0o700)
        assert [mode(folder) for folder in private] == [0o700, 0o700]
        assert mode(tmp_path / "state/state.json") == 0o600
        assert mode(tmp_path / "state/lock") == 0o600
        assert state.secret("a") not in repr(state)


def test_a_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    """A held folder is refused with the holder's pid, and is free again afterwards."""
    with (
        StateDir.locked(tmp_path, any_port),
        pytest.raises(SetupError, match=rf"in use by the process with pid {os.getpid()};"),
        StateDir.locked(tmp_path, any_port),
    ):
        pytest.fail("held twice")
    with StateDir.locked(tmp_path, any_port):
        pass


def test_the_holder_can_be_asked_for(tmp_path: Path) -> None:
    """Other commands can find the holder of a folder without blocking one."""
    assert holder_of(tmp_path / "missing") is None
    with StateDir.locked(tmp_path, any_port):
        assert holder_of(tmp_path) == os.getpid()
    assert holder_of(tmp_path) is None

    with open(tmp_path / "lock") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.1, fcntl.flock, (asking, fcntl.LOCK_UN)).start()
        with StateDir.locked(tmp_path, any_port):
            assert holder_of(tmp_path) == os.getpid()


def test_a_taken_port_is_not_chosen(tmp_path: Path) -> None:
    """Ports in use or already reserved are skipped."""
    free = {PORTS[7], PORTS[8]}
    with StateDir.locked(tmp_path, free.__contains__) as state:
        state.reserve(ports=["a", "b"])
        assert {state.port("a"), state.port("b")} == free
        with pytest.raises(SetupError, match="no free port"):
            state.reserve(ports=["c"])


def test_both_ports_of_a_pair_must_be_free(tmp_path: Path) -> None:
    """A paired port is only taken when the one above it is free as well."""
    good = PAIRED_PORTS[9]
    free: Callable[[int], bool] = lambda port: (  # noqa: E731 - reads as the rule it is
        port in PAIRED_PORTS or port == good + PAIR_OFFSET
    )
    with StateDir.locked(tmp_path, free) as state:
        state.reserve(paired_ports=["a"])
        assert state.port("a") == good


@pytest.mark.parametrize("content", ["", "[]", '{"ports": {}}', "{"])
def test_a_broken_state_file_is_named(tmp_path: Path, content: str) -> None:
    """Starting afresh would orphan the data, so an unreadable state file is an error."""
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(SetupError, match=r"state\.json"), StateDir.locked(tmp_path, any_port):
        pytest.fail("opened")


def test_a_write_that_dies_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old file stays unchanged until the new content is completely on disk."""
    write_private(tmp_path / "file", json.dumps("old"))

    def die(_descriptor: int) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        with pytest.raises(OSError, match="power cut"):
            write_private(tmp_path / "file", json.dumps("new"))
    assert (tmp_path / "file").read_text() == '"old"'
    write_private(tmp_path / "file", json.dumps("newer"))  # the torn draft does not interfere
    assert (tmp_path / "file").read_text() == '"newer"'
