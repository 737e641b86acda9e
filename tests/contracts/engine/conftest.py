"""Two engines, one after the other, each started once for all that is asked of it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from comfy_pool.engine import ComfyEngine
from comfy_pool.process.hosts import OwnedHost
from comfy_pool.process.process import EngineCommand
from tests.contracts.engine.bench import LIMITS, Bench, until
from tests.fakes import comfyui

NODES = Path(comfyui.__file__).with_name("nodes")


@pytest.fixture(
    scope="package", params=["fake", pytest.param("real", marks=pytest.mark.real_engine)]
)
def command(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> EngineCommand:
    """How to start the engine under test."""
    base_dir = tmp_path_factory.mktemp("engine")
    if request.param == "real":
        install = request.getfixturevalue("engine_install")
        python, app_dir, models_dir = install.python, install.app_dir, install.models_dir
        shutil.copytree(NODES, base_dir / "custom_nodes" / "test_nodes")
    else:
        python, app_dir, models_dir = Path(sys.executable), base_dir / "app", base_dir / "weights"
        app_dir.mkdir()
        program = f"import runpy\nrunpy.run_path({comfyui.__file__!r}, run_name='__main__')\n"
        (app_dir / "main.py").write_text(program)
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return EngineCommand(
        *(python, app_dir, base_dir, models_dir, free_port(), "cpu", environ),
        pixels_dir=tmp_path_factory.mktemp("pixels"),
    )


@pytest.fixture(scope="package")
async def bench(command: EngineCommand) -> AsyncIterator[Bench]:
    host = OwnedHost(command, slot="test")
    async with ComfyEngine(host, LIMITS) as engine:
        yield Bench(engine, host, command.base_dir)


@pytest.fixture(autouse=True)
async def nothing_left(bench: Bench) -> AsyncIterator[None]:
    """No run leaves a file, a history entry or a prompt in the engine (rules 9 and 10). One that
    succeeded has its result before it has cleaned up."""
    yield
    for result in bench.pixels_dir.iterdir():  # of tests that did not look at theirs
        result.unlink()
    await until(bench.is_empty)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
