"""Attacks on a stack's real ComfyUI by a page in a browser on the same machine."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from tests.support.raw_http import send_raw
from tests.support.stack import Stack

PATHS = ["/system_stats", "/queue", "/ws", "/", "/view?filename=input.png&type=input", "/nowhere"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "host",
    ["evil.test", "evil.test:{port}", "localhost.evil.test:{port}", "127.0.0.1", "127.0.0.1:1",
     "127.0.0.2:{port}", "0.0.0.0:{port}", "localhost.:{port}", "[::ffff:127.0.0.1]:{port}", ""],
)  # fmt: skip
def test_a_page_under_a_name_that_leads_to_loopback_is_refused(
    stack: Stack, path: str, host: str
) -> None:
    """DNS rebinding: Host and Origin match, but neither is the engine's own."""
    url = stack.comfyui_url()
    foreign = host.format(port=urlsplit(url).port)
    for headers in ({"Host": foreign}, {"Host": foreign, "Origin": f"http://{foreign}"}):
        for method in ("GET", "POST"):
            assert send_raw(url, method, path, headers).status == 403


@pytest.mark.parametrize("origin", ["http://evil.test", "null", "", "https://{own}", "file://"])
def test_a_page_of_another_origin_is_refused(stack: Stack, origin: str) -> None:
    """A page can do harm without reading the answer, for example with a POST to /prompt."""
    url = stack.comfyui_url()
    own = urlsplit(url).netloc
    headers = {"Host": own, "Origin": origin.format(own=own)}
    assert send_raw(url, "POST", "/prompt", headers).status == 403
    assert send_raw(url, "GET", "/queue", headers).status == 403


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]"])
def test_this_machine_is_let_in(stack: Stack, name: str) -> None:
    """Every name of loopback is accepted with the engine's port, and its origin or none."""
    url = stack.comfyui_url()
    host = f"{name}:{urlsplit(url).port}"
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host.lower()}"}):
        assert send_raw(url, "GET", "/queue", headers).status == 200
