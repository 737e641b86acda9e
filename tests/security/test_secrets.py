"""Secrets of a running stack stay in their files, and appear nowhere else."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from ray.serve._private.build_app import build_app

from actors.cluster.handles import APP
from serve_app.auth.local_issuer import KEY_FILE
from serve_app.deployment import PoolArgs, build
from serve_app.local.record import issuer_folder
from tests.fakes.site import API, photo, submission
from tests.support.stack import Stack
from tests.support.stack_processes import engines, of_stack

CHUNK_BYTES = 1 << 20
LONGEST_BYTES = 4096


@pytest.fixture(scope="module")
def secrets(stack: Stack) -> Mapping[str, bytes]:
    """Return every secret of the stack, and of a token that was used for a job and for failed
    calls.

    The issuer's key is represented by a line from its middle, the token by its signature.
    """
    token = stack.token("secretive")
    found = {"token": token.rpartition(".")[2].encode()}
    state = json.loads((stack.state_dir / "state.json").read_bytes())
    found |= {name: secret.encode() for name, secret in state["secrets"].items()}
    del found["s3-access-key"]  # an identifier that is part of every signed URL
    found["webhook"] = (stack.state_dir / "webhook-secret").read_bytes().removeprefix(b"whsec_")
    key = (issuer_folder(stack.state_dir) / KEY_FILE).read_bytes()
    found["issuer key"] = key.splitlines()[3]
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(
        base_url=stack.record.url, headers=headers, timeout=300, trust_env=False
    ) as http:
        job = http.post(API, **submission(), headers={"Prefer": "wait=60"})
        assert job.status_code in {200, 202}, job.text
        http.get(f"{API}/nonsense")
        http.get(API, headers={"Authorization": f"Bearer {token}x"})
        http.get(API, params={"access_token": token})
        http.post(API, files={"image": photo()}, data={"webhook_url": f"http://x:{token}@y/"})
    return found


@pytest.mark.secrets
def test_every_secret_is_known_to_this_test(secrets: Mapping[str, bytes]) -> None:
    """The secrets searched for below are too long to be found by accident."""
    assert len(secrets) >= 10
    assert all(len(secret) >= 16 for secret in secrets.values()), secrets.keys()


@pytest.mark.secrets
def test_no_secret_is_in_a_log(stack: Stack, secrets: Mapping[str, bytes]) -> None:
    """Neither the stack's own logs nor Ray's, with the output of every process, have a secret."""
    logs = [*_logs(stack)]
    assert len(logs) > 10
    assert any(b"request" in path.read_bytes() for path in logs)
    assert {(name, str(path)) for path in logs for name in _found(path, secrets)} == set()


@pytest.mark.secrets
def test_no_secret_is_on_a_command_line(stack: Stack, secrets: Mapping[str, bytes]) -> None:
    """Command lines are readable by every user of a machine."""
    processes = of_stack(stack.state_dir, stack.record.pid)
    assert len(processes) > 10
    for each in processes:
        assert not [name for name, secret in secrets.items() if secret in each.command.encode()]


@pytest.mark.secrets
def test_engines_have_no_secret(stack: Stack, secrets: Mapping[str, bytes]) -> None:
    """Engines run users' graphs, so neither they nor their guards have secrets in their
    environment."""
    found = engines(stack.state_dir)
    assert len(found) == 2
    for each in found.values():
        for pid in (each.pid, each.parent):
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            assert not [name for name, secret in secrets.items() if secret in environ]


@pytest.mark.secrets
@pytest.mark.parametrize(
    "path", ["/readyz", "/healthz", "/openapi.json", "/docs", API, f"{API}/nonsense", "/nowhere"]
)
def test_no_secret_is_in_an_answer(stack: Stack, secrets: Mapping[str, bytes], path: str) -> None:
    """No answer or problem contains a secret, with a token or without."""
    anybody = httpx.get(stack.record.url + path, trust_env=False, timeout=300)
    with stack.http("secretive") as http:
        somebody = http.get(path)
    for answer in (anybody, somebody):
        said = b"\n".join([answer.content, *(value for _, value in answer.headers.raw)])
        assert not [name for name, secret in secrets.items() if secret in said]


@pytest.mark.secrets
def test_files_with_secrets_are_their_owners(stack: Stack, secrets: Mapping[str, bytes]) -> None:
    """Each file with a secret is closed to others, itself or by a folder above it."""
    holders = {
        path: found
        for path in stack.state_dir.rglob("*")
        if path.is_file() and not path.is_symlink() and (found := _found(path, secrets))
    }
    assert set().union(*holders.values()) == secrets.keys() - {"token"}
    assert [path for path in holders if not _is_private(path, stack.state_dir)] == []


@pytest.mark.secrets
def test_no_secret_is_an_argument_of_an_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments sent to replicas hold only sizes; secrets come from each replica's
    environment."""
    secret = "no-one-may-see-this"
    for name in ("DATABASE_URL", "REDIS_URL", "AWS_SECRET_ACCESS_KEY", "WEBHOOK_SECRET"):
        monkeypatch.setenv(name, secret)
    deployments = build_app(build(PoolArgs()), name=APP).deployments
    assert len(deployments) == 4
    for deployment in deployments:
        config = deployment._replica_config
        sent = (
            *(config.serialized_deployment_def, config.serialized_init_args),
            *(config.serialized_init_kwargs, json.dumps(config.ray_actor_options).encode()),
        )
        assert not any(secret.encode() in part for part in sent if part)


def _logs(stack: Stack) -> Iterator[Path]:
    yield from stack.state_dir.rglob("*.log*")
    sessions = {
        link.resolve()
        for each in of_stack(stack.state_dir, stack.record.pid)
        for link in _open_files(each.pid)
        if "/session_" in str(link) and "/logs/" in str(link)
    }
    folders = {Path(str(path).partition("/logs/")[0]) / "logs" for path in sessions}
    assert len(folders) == 1, "Ray's session was not found, or more than one"
    for folder in folders:
        yield from (path for path in folder.rglob("*") if path.is_file())


def _open_files(pid: int) -> list[Path]:
    try:
        return [link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []


def _found(path: Path, secrets: Mapping[str, bytes]) -> set[str]:
    """Return the names of the secrets in a file, which is read in overlapping chunks."""
    found: set[str] = set()
    tail = b""
    with suppress(FileNotFoundError), path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            text = tail + chunk
            found |= {name for name, secret in secrets.items() if secret in text}
            tail = text[-LONGEST_BYTES:]
    return found


def _is_private(path: Path, top: Path) -> bool:
    chain = [path, *(each for each in path.parents if each.is_relative_to(top))]
    return any(_is_closed(each) for each in chain)


def _is_closed(path: Path) -> bool:
    mode = os.stat(path).st_mode
    others = stat.S_IRGRP | stat.S_IROTH if path.is_file() else stat.S_IXGRP | stat.S_IXOTH
    return not mode & others
