"""Run the suite on two engines, a fake and a real one, each started once."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from comfy_pool.engine import ComfyEngine
from comfy_pool.process.hosts import OwnedHost
from comfy_pool.process.process import EngineCommand
from serve_app.local.temporary import free_port
from tests.contracts.engine.bench import LIMITS, Bench
from tests.fakes import comfyui
from tests.support.polling import until

NODES = Path(comfyui.__file__).with_name("nodes")


@pytest.fixture(
    scope="package", params=["fake", pytest.param("real", marks=pytest.mark.real_engine)]
)
def command(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> EngineCommand:
    """Return the command that starts the engine under test."""
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
    """Assert that a run leaves no file, history entry or prompt in the engine (rules 9 and 10). A
    successful run returns before it has cleaned up, so this waits."""
    yield
    for result in bench.pixels_dir.iterdir():  # left by tests that did not read theirs
        result.unlink()
    await until(bench.is_empty)
