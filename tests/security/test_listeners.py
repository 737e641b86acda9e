"""The listening ports of the running stack, and the protection of those that are reachable."""

from __future__ import annotations

import os
from contextlib import suppress
from ipaddress import IPv6Address, ip_address

import grpc
import httpx
import psutil
import pytest

from serve_app.haproxy import ENABLED
from tests.support.raw_http import send_raw
from tests.support.stack import Stack
from tests.support.stack_processes import of_stack

UNARY = "/ray.serve.ASGIService/HandleRequest"  # the name that Serve uses
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def _listeners(stack: Stack) -> dict[tuple[str, int], str]:
    """Return the command behind each listening (address, port) of the stack."""
    found: dict[tuple[str, int], str] = {}
    for each in of_stack(stack.state_dir, stack.record.pid):
        with suppress(psutil.Error):  # ended meanwhile
            for connection in psutil.Process(each.pid).net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found[tuple(connection.laddr)] = each.command
    return found


def _is_loopback(address: str) -> bool:
    parsed = ip_address(address)
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return parsed.is_loopback


@pytest.mark.exposure
def test_what_can_be_reached_from_outside_asks_for_rays_token(stack: Stack) -> None:
    """Engines, Postgres, Redis, S3, the issuer, HTTP and Ray listen on loopback, and so do HAProxy,
    its metrics and its statistics where it is enabled. On all interfaces there is only one port per
    replica, for calls between deployments, whose address Serve does not let us set. There a call
    without Ray's token, or with a wrong one, is refused before it is read."""
    listeners = _listeners(stack)
    commands = "\n".join(listeners.values())
    parts = ["postgres", "valkey", "weed", "local_issuer", "gcs_server", "raylet", "main.py"]
    if os.environ.get(ENABLED) == "1":
        parts.append("haproxy")
    for part in parts:
        assert part in commands, f"{part} was not found, so it was not looked at"
    others = {where: by for where, by in listeners.items() if not _is_loopback(where[0])}
    assert {by for by in others.values() if not by.startswith("ray::ServeReplica:")} == set()
    for (_, port), by in others.items():
        for metadata in ((), (("authorization", "Bearer " + "0" * 64),)):
            assert _answer(port, metadata) is grpc.StatusCode.UNAUTHENTICATED, by


def _answer(port: int, metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
    """Return a replica's status for a call from another deployment."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(UNARY)
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", metadata=metadata, timeout=300)
    code: grpc.StatusCode = refused.value.code()
    return code


@pytest.mark.exposure
@pytest.mark.parametrize(
    "path",
    [
        *("/prompt", "/view?filename=a.png", "/system_stats", "/ws", "/queue", "/history"),
        *("/object_info", "/upload/image", "/api/prompt", "/internal/logs", "/free"),
        "/api/v1/restorations/../../../prompt",
        "/api/v1/restorations/%2e%2e/%2e%2e/%2e%2e/prompt",
        "//127.0.0.1:8188/prompt",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_comfyui_is_not_behind_the_ingress(stack: Stack, path: str, method: str) -> None:
    """None of ComfyUI's paths exists, and every answer is one of our problems."""
    url, user = stack.record.url, {"Authorization": f"Bearer {stack.token()}"}
    answer = send_raw(url, method, path, user)
    upgraded = send_raw(url, "GET", path, user | UPGRADE)
    assert answer.status in {404, 405}
    assert upgraded.status in {400, 403, 404, 405}  # refused by the HTTP server
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.exposure
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_ingress_is_nobodys_proxy(stack: Stack, method: str) -> None:
    """A request line with an engine's absolute URL is refused by the service."""
    user = {"Authorization": f"Bearer {stack.token()}"}
    target = f"{stack.comfyui_url()}/prompt"
    answer = send_raw(stack.record.url, method, target, user)
    assert (answer.status, answer.headers["content-type"]) == (404, "application/problem+json")
    assert 400 <= send_raw(stack.record.url, "GET", target, user | UPGRADE).status < 500


@pytest.mark.exposure
def test_comfyui_is_there_to_be_protected(stack: Stack) -> None:
    """ComfyUI answers on loopback, which shows that the paths above are its own."""
    answer = httpx.get(f"{stack.comfyui_url()}/system_stats", trust_env=False, timeout=300)
    assert answer.status_code == 200
