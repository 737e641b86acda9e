"""An engine under test, and ways to inspect it from outside."""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import httpx

from comfy_pool.engine import ComfyEngine
from comfy_pool.limits import EngineLimits
from comfy_pool.process.hosts import AttachedHost, OwnedHost
from restoration.engine_port import EngineResult, EngineRun
from tests.fakes.graphs import ignore
from tests.support.polling import until

LIMITS = EngineLimits(blind_poll_s=0.1, poll_s=1.0, stop_poll_s=0.1)
DEADLINE_S = 300


@dataclass(frozen=True)
class Bench:
    engine: ComfyEngine
    host: OwnedHost
    base_dir: Path

    @property
    def pixels_dir(self) -> Path:
        assert self.host.pixels is not None
        return self.host.pixels

    async def attached(self, run: EngineRun) -> EngineResult:
        """Return the result of a run through the plain protocol, as on an engine that we do not
        own."""
        async with ComfyEngine(AttachedHost(self.host.base_url), LIMITS) as engine:
            try:
                return await engine.run(run, ignore)
            finally:  # The protocol has no call that deletes files.
                for side in ("input", "output"):
                    runs = self.base_dir / side / "comfy-restore"
                    await asyncio.to_thread(shutil.rmtree, runs, ignore_errors=True)

    async def is_empty(self) -> bool:
        return not (await self.files() or await self.history() or await self.queue())

    async def history(self) -> dict[str, object]:
        return dict(await self._get("/history"))

    async def queue(self) -> list[object]:
        answer = await self._get("/queue")
        return [*answer["queue_running"], *answer["queue_pending"]]

    async def _get(self, path: str) -> dict[str, list[object]]:
        async with httpx.AsyncClient(base_url=self.host.base_url, trust_env=False) as client:
            answer: dict[str, list[object]] = (await client.get(path)).json()
            return answer

    async def files(self) -> list[str]:
        """Return the files that runs have left in the engine's folders."""
        return await asyncio.to_thread(_files, self.base_dir / "input", self.base_dir / "output")


def _files(*folders: Path) -> list[str]:
    # Not Path.rglob, which raises when the engine deletes a folder during the walk.
    walks = (os.walk(folder) for folder in folders)
    return [os.path.join(path, name) for walk in walks for path, _, names in walk for name in names]


async def until_running(bench: Bench, run: EngineRun) -> None:
    """Return once the engine executes the run, not only queues it."""

    async def is_first() -> bool:
        queue = (await bench._get("/queue"))["queue_running"]
        return any(str(run.id) in str(item) for item in queue)

    await until(is_first)
