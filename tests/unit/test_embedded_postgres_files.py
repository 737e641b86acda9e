"""Postgres' files: the pid in the lock file, and the folders another account can enter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from persistence.embedded import postgres_files
from persistence.embedded.postgres_files import (
    DataFolder,
    closed_folder,
    command_line,
    find_programs,
    locale_options,
)
from restoration.errors import SetupError
from restoration.processes.child import Account


@pytest.fixture
def data(tmp_path: Path) -> DataFolder:
    (tmp_path / "data").mkdir()
    return DataFolder(path=tmp_path / "data", programs=tmp_path, account=None)


@pytest.mark.parametrize(
    "content",
    [f"{os.getpid()}\n/data\n", "", "torn"],
    ids=["another program's pid", "empty", "torn"],
)
def test_a_lock_that_no_postgres_holds_is_removed(data: DataFolder, content: str) -> None:
    """A pid that now belongs to another program, or a torn file, does not block a start."""
    lock = data.path / "postmaster.pid"
    lock.write_text(content)
    data.clear_stale_lock()
    assert not lock.exists()


def test_the_lock_of_a_running_postgres_stays(
    data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two Postgres on one data folder would destroy it, so a lock in use is kept."""
    arguments = f"postgres -D {data.path} -c port=1 "
    monkeypatch.setattr(postgres_files, "command_line", {77: arguments}.__getitem__)
    (data.path / "postmaster.pid").write_text("77\n")
    data.clear_stale_lock()
    assert (data.path / "postmaster.pid").exists()


def test_no_lock_is_no_error(data: DataFolder) -> None:
    """A proper shutdown leaves no lock file."""
    data.clear_stale_lock()


def test_command_line_of_nobody() -> None:
    """An unused pid gives an empty command line; ours names pytest's interpreter."""
    assert command_line(2**22 + 1) == ""
    assert "python" in command_line(os.getpid()) or "pytest" in command_line(os.getpid())


def test_the_outermost_closed_folder_is_named(tmp_path: Path) -> None:
    """Of several folders on the path that others cannot enter, the first is reported."""
    inner = tmp_path / "a/b"
    inner.mkdir(parents=True)
    (tmp_path / "a").chmod(0o700)
    inner.chmod(0o700)
    tmp_path.chmod(0o755)
    closed = closed_folder(inner)
    # as root, pytest itself closes a folder above tmp_path
    assert closed is not None
    assert closed == tmp_path / "a" or closed in tmp_path.parents


def test_programs_out_of_reach_are_refused(tmp_path: Path) -> None:
    """Before the start, root gets the name of the folder that Postgres' account cannot enter."""
    programs = tmp_path / "closed" / "bin"
    programs.mkdir(parents=True)
    for name in ("postgres", "initdb"):
        (programs / name).touch(mode=0o755)
    (tmp_path / "closed").chmod(0o700)
    with pytest.raises(SetupError, match="is closed to the account nobody"):
        find_programs(programs, tmp_path, Account("nobody", 65534, 65534))
    assert find_programs(programs, tmp_path, None) == programs


def test_a_folder_without_postgres_is_refused(tmp_path: Path) -> None:
    """A wrong programs folder is detected at once and named."""
    with pytest.raises(SetupError, match="is not a folder of Postgres's programs"):
        find_programs(tmp_path, tmp_path, None)


def test_older_postgres_has_no_builtin_locale() -> None:
    """The builtin locale provider came with version 17; Debian 12 carries 15."""
    assert "--locale-provider=builtin" in locale_options(17)
    assert locale_options(15) == ("--encoding=UTF8", "--locale=C")
