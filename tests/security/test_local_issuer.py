"""The local issuer exists only for a local stack without Auth0."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import pytest

from persistence.embedded.state import StateDir
from restoration.settings import NodeSettings
from serve_app.auth.local_issuer import KEY_FILE, ensure_key
from serve_app.local.record import StackRecord, issuer_folder, recording
from serve_app.local.stack import _services
from tests.support.raw_http import send_raw
from tests.support.stack import Stack, run_restore
from tests.support.stack_processes import of_stack

ELSEWHERE = {
    "DATABASE_URL": "postgresql://db.invalid/d",
    "REDIS_URL": "redis://redis.invalid",
    "S3_BUCKET": "photos",
}
AUTH0 = {"AUTH0_DOMAIN": "tenant.eu.auth0.com", "AUTH0_AUDIENCE": "https://restore.example.com"}
ISSUER = "serve_app.auth.local_issuer"
LISTENING = "0A"
LOOPBACK = "0100007F"  # 127.0.0.1 in the kernel's notation


@pytest.fixture
def state_dir() -> Iterator[Path]:
    with TemporaryDirectory(prefix="comfy-restore-") as folder:
        yield Path(folder)


def _started(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch, environ: Mapping[str, str]
) -> tuple[Mapping[str, str], list[str]]:
    """Start the services as `restore up` does; return their settings and the running issuers."""
    for name in ("AUTH0_DOMAIN", "AUTH0_AUDIENCE", "LOCAL_ISSUER_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**ELSEWHERE, **environ}.items():
        monkeypatch.setenv(name, value)
    with _services(NodeSettings(state_dir=state_dir), lambda _step: None) as addresses:
        return addresses, [each.command for each in of_stack(state_dir) if each.runs(ISSUER)]


def _addresses_of(port: int) -> set[str]:
    """Return the IPv4 and IPv6 addresses with a listener on `port`."""
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    listening = [line[1].split(":") for line in lines if line[3] == LISTENING]
    return {address for address, number in listening if int(number, 16) == port}


@pytest.mark.auth
def test_with_auth0_there_is_no_local_issuer(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no process, port, key or address of a local issuer."""
    addresses, issuers = _started(state_dir, monkeypatch, AUTH0)
    assert issuers == []
    assert "LOCAL_ISSUER_URL" not in addresses
    assert not issuer_folder(state_dir).exists()
    state = state_dir / "state.json"
    assert not state.exists() or "issuer" not in state.read_text()


@pytest.mark.auth
def test_without_auth0_there_is_one(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same start without the variables has one, so the test above can fail."""
    addresses, issuers = _started(state_dir, monkeypatch, {})
    assert len(issuers) == 1
    assert addresses["LOCAL_ISSUER_URL"].startswith("http://127.0.0.1:")
    assert (issuer_folder(state_dir) / KEY_FILE).exists()


@pytest.mark.auth
def test_with_auth0_no_token_is_minted(state_dir: Path) -> None:
    """`restore token` names Auth0 in one line, even if an earlier key exists."""
    ensure_key(issuer_folder(state_dir))
    with StateDir.locked(state_dir, lambda _port: True):
        with recording(state_dir) as record:
            record(StackRecord(os.getpid(), "http://127.0.0.1:1", "127.0.0.1:2"))
            done = run_restore(state_dir, "token", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "error: the local stack issues no tokens since AUTH0_DOMAIN is set; get one from Auth0"
    ]


@pytest.mark.auth
@pytest.mark.parametrize("umask", [0, 0o022])
def test_the_key_is_its_owners_alone(state_dir: Path, umask: int) -> None:
    """The key is private under any umask, and is made private again if it was opened."""
    folder = issuer_folder(state_dir)
    before = os.umask(umask)
    try:
        ensure_key(folder)
    finally:
        os.umask(before)
    assert _modes(folder) == (0o700, 0o600)
    folder.chmod(0o755)
    (folder / KEY_FILE).chmod(0o644)
    ensure_key(folder)
    assert _modes(folder) == (0o700, 0o600)


def _modes(folder: Path) -> tuple[int, int]:
    return (
        stat.S_IMODE(folder.stat().st_mode),
        stat.S_IMODE((folder / KEY_FILE).stat().st_mode),
    )


@pytest.mark.auth
def test_a_running_stacks_issuer_is_on_loopback(stack: Stack) -> None:
    """Its port is open only on 127.0.0.1, and its key is private."""
    issuer = stack.record.issuer
    assert issuer is not None
    port = urlsplit(issuer).port
    assert port is not None
    assert _addresses_of(port) == {LOOPBACK}
    assert _modes(issuer_folder(stack.state_dir)) == (0o700, 0o600)
    with socket.create_connection(("127.0.0.1", port), timeout=10):
        pass  # a server does listen there


@pytest.mark.auth
def test_the_key_is_not_served(stack: Stack) -> None:
    """The issuer serves its two documents, and no file of its folder."""
    issuer = stack.record.issuer
    assert issuer is not None
    key = issuer_folder(stack.state_dir) / KEY_FILE
    assert key.exists()
    up = (f"../issuer/{KEY_FILE}", f"..%2fissuer%2f{KEY_FILE}", f".well-known/../{KEY_FILE}")
    for path in (KEY_FILE, *up, str(key), "", ".well-known/", "../state.json", "..%2fstate.json"):
        answer = send_raw(issuer, "GET", f"/{path}")
        assert answer.status == 404, path
        assert b"PRIVATE KEY" not in answer.body
