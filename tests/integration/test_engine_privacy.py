"""The privacy of an owned engine: its files, and the requests that it answers."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from aiohttp import web

from comfy_pool.nodes.loopback import guard_prompt_server
from comfy_pool.process.process import EngineProcess
from tests.fakes.comfyui_engines import stand_in
from tests.support.raw_http import send_raw

MAKES_FILES = """
import os, pathlib, sys
base = pathlib.Path(sys.argv[sys.argv.index("--base-directory") + 1])
(base / "output" / "of-a-run").mkdir()
(base / "output" / "of-a-run" / "result.png").write_bytes(b"a photo")
(base / "temp" / "preview.png").write_bytes(b"a photo")
(base / "environ.txt").write_text(os.environ.get("COMFY_RESTORE_LOOPBACK_ONLY", "unset"))
"""


@pytest.fixture
def permissive() -> Iterator[None]:
    """Set a umask that lets others read."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("permissive")
async def test_what_an_engine_writes_is_for_its_account_alone(tmp_path: Path) -> None:
    """Its files are private although its code sets no modes and its folders were open before."""
    command = stand_in(tmp_path)
    (command.base_dir / "output").mkdir(parents=True)
    (command.app_dir / "main.py").write_text(MAKES_FILES)
    async with await EngineProcess.start(command) as process:
        await process.exited()
    modes = {path.name: path.lstat().st_mode for path in command.base_dir.rglob("*")}
    modes["the folder itself"] = command.base_dir.stat().st_mode
    assert {"result.png", "preview.png", "of-a-run"} <= modes.keys()
    modes.pop("engine.log", None)  # not a photo, and in a folder that other accounts cannot enter
    assert {
        name for name, mode in modes.items() if not stat.S_ISLNK(mode) and mode & 0o077
    } == set()


async def test_an_engine_of_ours_is_told_to_serve_its_machine_alone(tmp_path: Path) -> None:
    """The node pack that restricts it to loopback is installed, even without hand-over of
    results."""
    command = stand_in(tmp_path)
    (command.app_dir / "main.py").write_text(MAKES_FILES)
    async with await EngineProcess.start(command) as process:
        await process.exited()
    assert (command.base_dir / "environ.txt").read_text() == "1"
    assert (command.base_dir / "custom_nodes" / "comfy-restore" / "loopback.py").is_file()


@pytest.fixture
async def guarded(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """Yield the URL of a server like ComfyUI's, guarded by the check in our node pack."""

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text="reached")

    app = web.Application()
    app.router.add_route("*", "/prompt", answer)
    comfyui = ModuleType("server")
    vars(comfyui)["PromptServer"] = SimpleNamespace(instance=SimpleNamespace(app=app))
    monkeypatch.setitem(sys.modules, "server", comfyui)
    guard_prompt_server()
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "LOCALHOST:{port}"}, 200),
        ({"Host": "[::1]:{port}", "Origin": "http://[::1]:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Host": "evil.test:{port}"}, 403),
        ({"Host": "evil.test:{port}", "Origin": "http://evil.test:{port}"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Host": "localhost.:{port}"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "https://127.0.0.1:{port}"}, 403),
        ({"Host": "127.0.0.1:{port}", "Origin": "http://127.0.0.1:1"}, 403),
    ],
    ids=str,
)
async def test_a_foreign_page_does_not_reach_an_engine(
    guarded: str, headers: dict[str, str], status: int
) -> None:
    """A foreign Host or Origin is refused, on existing and missing paths."""
    port = guarded.rpartition(":")[2]
    sent = {name: value.format(port=port) for name, value in headers.items()}
    for method in ("GET", "POST"):
        answer = await asyncio.to_thread(send_raw, guarded, method, "/prompt", sent)
        assert answer.status == status
    answer = await asyncio.to_thread(send_raw, guarded, "GET", "/nowhere", sent)
    assert answer.status == (404 if status == 200 else 403)
