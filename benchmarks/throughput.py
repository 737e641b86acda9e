"""What one worker makes of one ComfyUI, against a bare client that keeps its queue full.

Both run the same graph on an engine of their own, which holds its GPU for a stated time without
using a core; both take the photo from memory and have the PNG in hand at the end.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from PIL import Image

from benchmarks.bare_client import Work, end_times_s
from benchmarks.figures import HERE, Bench, Figure, Goal
from comfy_pool.assembly import installed_engine
from comfy_pool.engine import ComfyEngine
from comfy_pool.hosts import OwnedHost
from comfy_pool.process import EngineCommand
from restoration.settings import NodeSettings
from tests.photos import original
from tests.stack import Stack, free_port
from workflows.catalog import load_catalog
from workflows.render import render

WORKFLOW = "held"
ROUNDS = 3
IN_FLIGHT = 6
WARM_UP_JOBS = 2  # of each round, left out
WAIT_S = 60
SINGLE_JOBS = 30


@dataclass(frozen=True, slots=True)
class Held:
    """Jobs with a square result of `side` pixels that take the GPU `seconds` each."""

    side: int
    seconds: float
    jobs: int

    @property
    def params(self) -> dict[str, float]:
        return {"size": self.side, "seconds": self.seconds}

    def photo(self) -> bytes:
        out = io.BytesIO()
        side = self.side // 4
        original("china").resize((side, side), Image.Resampling.LANCZOS).save(out, "JPEG")
        return out.getvalue()

    def work(self) -> Work:
        workflow = load_catalog(more=HERE / "workflows").find(WORKFLOW)
        prompt = render(workflow, workflow.resolve(self.params), "photo", "result")
        return Work(self.photo(), prompt, "photo", "result")


LARGE, SMALL = Held(4096, 1.0, jobs=12), Held(1024, 0.2, jobs=40)
TINY = Held(256, 0.0, jobs=SINGLE_JOBS)


def throughput(bench: Bench) -> Sequence[Figure]:
    """Rounds of the bare client and of the service, in turns."""
    return asyncio.run(_measure(bench))


async def _measure(bench: Bench) -> list[Figure]:
    async with _bare_comfyui() as bare_url, _Client.to(bench.stack) as client:
        return [
            await _rate(bench, bare_url, client, LARGE, Goal(1.8, at_least=True)),
            await _rate(bench, bare_url, client, SMALL, Goal(1.4, at_least=True)),
            await _added_time(bench, bare_url, client),
        ]


@asynccontextmanager
async def _bare_comfyui() -> AsyncIterator[str]:
    """The URL of an engine with ComfyUI's own nodes and the one that holds the GPU."""
    installed = installed_engine(NodeSettings())
    with tempfile.TemporaryDirectory(prefix="comfy-bench-") as folder:
        command = EngineCommand(
            installed.python,
            installed.app_dir,
            Path(folder),
            installed.models_dir,
            free_port(),
            "cpu",
            {name: os.environ[name] for name in ("PATH", "HOME")},
            nodes=(HERE / "nodes",),
        )
        host = OwnedHost(command)
        async with ComfyEngine(host):
            yield host.base_url


async def _rate(bench: Bench, bare_url: str, client: _Client, held: Held, goal: Goal) -> Figure:
    rates = []
    for n in range(ROUNDS):
        bare = _per_s(await end_times_s(bare_url, held.work(), held.jobs))
        ours = _per_s(await client.end_times_s(held, IN_FLIGHT))
        bench.say(f"  {held.side}x{held.side}, round {n + 1}: {ours:.2f}/s over {bare:.2f}/s")
        rates.append((ours, bare))
    return Figure(
        f"jobs/s over a bare client, {held.side}x{held.side}, {held.seconds:g} s",
        [ours / bare for ours, bare in rates],
        goal,
        parts=f"{statistics.median(ours for ours, _ in rates):.2f}/s over "
        f"{statistics.median(bare for _, bare in rates):.2f}/s",
    )


def _per_s(ended_at_s: Sequence[float]) -> float:
    steady = sorted(ended_at_s)[WARM_UP_JOBS:]
    return (len(steady) - 1) / (steady[-1] - steady[0])


async def _added_time(bench: Bench, bare_url: str, client: _Client) -> Figure:
    added_ms, parts = [], ""
    for n in range(ROUNDS):
        bare = _median_gap_ms(await end_times_s(bare_url, TINY.work(), TINY.jobs, in_flight=1))
        ours = _median_gap_ms(await client.end_times_s(TINY, in_flight=1))
        parts = f"{ours:.0f} ms over {bare:.0f} ms"
        bench.say(f"  one job at a time, round {n + 1}: {parts}")
        added_ms.append(ours - bare)
    goal = Goal(35.0, at_least=False, tolerance=0.1)
    return Figure("added time of a single job, p50", added_ms, goal, "ms", parts)


def _median_gap_ms(ended_at_s: Sequence[float]) -> float:
    """Between one job's end and the next, where each begins when the last has ended."""
    pairs = zip(ended_at_s[WARM_UP_JOBS:], ended_at_s[WARM_UP_JOBS + 1 :], strict=False)
    return 1e3 * statistics.median(after - before for before, after in pairs)


class _Client:
    """Submits, waits and fetches over HTTP, with everything on."""

    def __init__(self, http: aiohttp.ClientSession, stack: Stack) -> None:
        self._http = http
        self._url = stack.record.url
        self._headers = {"Authorization": f"Bearer {stack.token('bench')}"}

    @classmethod
    @asynccontextmanager
    async def to(cls, stack: Stack) -> AsyncIterator[_Client]:
        async with aiohttp.ClientSession() as http:
            yield cls(http, stack)

    async def end_times_s(self, held: Held, in_flight: int) -> list[float]:
        """As the bare client's."""
        left, photo, ended_at_s = iter(range(held.jobs)), held.photo(), list[float]()

        async def work_off() -> None:
            for _ in left:
                await self._fetch(await self._run(held, photo))
                ended_at_s.append(time.monotonic())

        await asyncio.gather(*(work_off() for _ in range(in_flight)))
        return ended_at_s

    async def _run(self, held: Held, photo: bytes) -> str:
        """The path of the result."""
        form = aiohttp.FormData({"workflow": WORKFLOW, "params": json.dumps(held.params)})
        form.add_field("image", photo, filename="photo.jpg")
        headers = {**self._headers, "Prefer": f"wait={WAIT_S}"}
        url = f"{self._url}/api/v1/restorations"
        async with self._http.post(url, data=form, headers=headers) as answer:
            job = await answer.json()
        assert job["status"] == "succeeded", job
        path: str = job["links"]["result"]
        return path

    async def _fetch(self, path: str) -> bytes:
        url = self._url + path
        redirect = self._http.get(url, headers=self._headers, allow_redirects=False)
        async with redirect as answer:
            signed = answer.headers["location"]
        async with self._http.get(signed) as answer:
            answer.raise_for_status()
            return await answer.read()
