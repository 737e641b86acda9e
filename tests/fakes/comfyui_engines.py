"""Engines on the fake ComfyUI, either attached to one in this process or owning one."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from comfy_pool.engine import ComfyEngine
from comfy_pool.limits import EngineLimits
from comfy_pool.process.hosts import AttachedHost
from comfy_pool.process.process import EngineCommand
from serve_app.local.temporary import free_port
from tests.fakes import comfyui
from tests.fakes.comfyui import FakeComfyUI, serving
from tests.fakes.comfyui_worker import Script

LIMITS = EngineLimits(
    answer_s=3.0, probe_s=3.0, poll_s=3000.0, blind_poll_s=0.05, stop_poll_s=0.02, unreachable_s=3.0
)
DEADLINE_S = 300


@asynccontextmanager
async def scripted(
    base_dir: Path, script: Script, limits: EngineLimits = LIMITS
) -> AsyncIterator[tuple[FakeComfyUI, ComfyEngine]]:
    """Attach an engine to a scripted fake; the test fails if it takes longer than DEADLINE_S."""
    async with (
        asyncio.timeout(DEADLINE_S),
        serving(base_dir, script) as fake,
        ComfyEngine(AttachedHost(fake.url), limits) as engine,
    ):
        yield fake, engine
    assert not [t for t in threading.enumerate() if t.name == "comfyui-events"]


def stand_in(folder: Path) -> EngineCommand:
    """Write the fake's program, and return the command that starts it as an owned process."""
    (folder / "app").mkdir()
    mend(folder / "app")
    return EngineCommand(
        python=Path(sys.executable),
        app_dir=folder / "app",
        base_dir=folder / "base",
        models_dir=folder / "models",
        port=free_port(),
        variant="cpu",
        environ={"PATH": os.environ["PATH"]},
    )


def mend(app_dir: Path) -> None:
    program = f"import runpy\nrunpy.run_path({comfyui.__file__!r}, run_name='__main__')\n"
    (app_dir / "main.py").write_text(program)


def spoil(app_dir: Path, last_words: str) -> None:
    """Make the program exit with `last_words` as soon as it starts."""
    (app_dir / "main.py").write_text(f"raise SystemExit({last_words!r})")
