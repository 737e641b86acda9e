"""Measure how much longer an owner's submission takes beside a greedy owner than alone.

The greedy owner takes all that the service's default limits leave to one owner, and asks again for
what ends or is refused: pictures that are slow to decode, batches of them, uploads that stop
half-way, waits, event streams, and downloads that are not read. The number of its requests in a
second is fixed, because a limit of requests is there for those.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from PIL import Image

from benchmarks.figures import Bench, Figure, Goal
from benchmarks.service_client import WORKFLOW, Held, ServiceClient
from benchmarks.submits import OCCUPIED, PHOTO_BYTES, photo_of
from serve_app.local.temporary import LocalStack

ROUNDS, SUBMISSIONS = 3, 15
# With those of the waits, the half of the places for uploads that one owner may hold
PICTURES, BATCHES, STOPPED_UPLOADS = 16, 4, 8
BATCH_PICTURES = 20
SMALL_RESULT = {"size": 64, "seconds": 0.0}  # a picture of that size may not be enlarged
STREAMS, WAITS, DOWNLOADS = 1_000, 500, 32
REQUESTS_PER_S, AT_FIRST_PER_S = 20, 60
STOPPED_S = 20.0
QUIET_S = 10.0  # between rounds, for what the greedy owner has left behind


def fairness(bench: Bench) -> Sequence[Figure]:
    """Measure in turns, on a service of its own because thousands of jobs wait at the end."""
    with bench.new_stack(1, {}) as stack:
        rounds = asyncio.run(_rounds(bench, stack))
    return [
        Figure(
            "time of a submission beside a greedy owner, over its time alone",
            [beside_s / alone_s for alone_s, beside_s in rounds],
            Goal(3.0, at_least=False, tolerance=0.1),
            parts=f"{1e3 * statistics.median(beside for _, beside in rounds):.0f} ms over "
            f"{1e3 * statistics.median(alone for alone, _ in rounds):.0f} ms",
        )
    ]


def slow_picture() -> bytes:
    """Return a PNG of 16 megapixels in a few bytes: quick to send and slow to decode."""
    out = io.BytesIO()
    Image.new("RGB", (4000, 3900), (90, 120, 60)).save(out, "PNG")
    return out.getvalue()


async def _rounds(bench: Bench, stack: LocalStack) -> list[tuple[float, float]]:
    photo, rounds = photo_of(PHOTO_BYTES), []
    async with ServiceClient.to(stack, "modest") as modest, _open_greedy(stack) as greedy:
        await modest.submit(WORKFLOW, OCCUPIED, photo)  # leaves the cores to the submissions
        await greedy.submit_watched_job()
        for n in range(ROUNDS):
            alone_s = await _median_s(modest, photo)
            async with greedy.at_work():
                held = ", ".join(f"{count} {what}" for what, count in greedy.held.items())
                beside_s = await _median_s(modest, photo)
            bench.say(
                f"  fairness, round {n + 1}: {1e3 * beside_s:.0f} ms over {1e3 * alone_s:.0f} ms; "
                f"the greedy owner held {held}"
            )
            rounds.append((alone_s, beside_s))
            await asyncio.sleep(QUIET_S)
    return rounds


async def _median_s(client: ServiceClient, photo: bytes) -> float:
    took_s = []
    for _ in range(SUBMISSIONS):
        began = time.perf_counter()
        await client.submit("enlarge", {}, photo)
        took_s.append(time.perf_counter() - began)
    return statistics.median(took_s)


@dataclass
class _Greedy:
    """The greedy owner. `held` counts its requests that the service is working on."""

    http: aiohttp.ClientSession
    client: ServiceClient
    result: str  # path of a large one
    held: Counter[str] = field(default_factory=Counter)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _made_once: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    _requests_per_s: float = AT_FIRST_PER_S
    _watched: Mapping[str, Any] = field(default_factory=dict)
    _slow: bytes = field(default_factory=slow_picture)
    _small: bytes = field(default_factory=lambda: photo_of(20_000))

    async def submit_watched_job(self) -> None:
        self._watched = await self.client.submit("enlarge", {}, self._small)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Make all requests until the block ends, which begins when each was made once."""
        calls = {
            self._watch: STREAMS,
            self._wait: WAITS,
            self._stop_download: DOWNLOADS,
            self._stop_upload: STOPPED_UPLOADS,
            self._send_picture: PICTURES,
            self._send_batch: BATCHES,
        }
        self._requests_per_s = AT_FIRST_PER_S
        tasks = [
            asyncio.create_task(self._again_and_again(call))
            for call, count in calls.items()
            for _ in range(count)
        ]
        try:
            for _ in tasks:
                await self._made_once.acquire()
            self._requests_per_s = REQUESTS_PER_S
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _again_and_again(self, call: Callable[[], Awaitable[None]]) -> None:
        for n in itertools.count():
            async with self._turn:
                await asyncio.sleep(1 / self._requests_per_s)
            if n == 0:
                self._made_once.release()
            with suppress(aiohttp.ClientError, TimeoutError):  # refused, or broken off
                await call()

    @contextmanager
    def _holding(self, what: str) -> Iterator[None]:
        self.held[what] += 1
        try:
            yield
        finally:
            self.held[what] -= 1

    async def _send_picture(self) -> None:
        with self._holding("slow pictures"):
            await self.client.submit(WORKFLOW, SMALL_RESULT, self._slow)

    async def _send_batch(self) -> None:
        form = aiohttp.FormData({"workflow": WORKFLOW, "params": json.dumps(SMALL_RESULT)})
        for n in range(BATCH_PICTURES):
            form.add_field("image", self._slow, filename=f"{n}.png")
        with self._holding("batches"):
            async with self.http.post("/api/v1/batches", data=form) as answer:
                answer.raise_for_status()

    async def _stop_upload(self) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield b"--x\r\n"
            await asyncio.Event().wait()

        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        with self._holding("stopped uploads"):
            async with self.http.post(
                "/api/v1/restorations", data=body(), headers=headers
            ) as answer:
                answer.raise_for_status()

    async def _watch(self) -> None:
        async with self.http.get(self._watched["links"]["events"]) as answer:
            answer.raise_for_status()
            with self._holding("event streams"):
                await answer.read()

    async def _wait(self) -> None:
        with self._holding("waits"):
            await self.client.submit("enlarge", {}, self._small, wait_s=60)

    async def _stop_download(self) -> None:
        async with self.http.get(self.result, params={"download": "1"}) as answer:
            answer.raise_for_status()
            with self._holding("stopped downloads"):
                await asyncio.sleep(STOPPED_S)


@asynccontextmanager
async def _open_greedy(stack: LocalStack) -> AsyncIterator[_Greedy]:
    token, url = stack.token("greedy"), stack.record.url
    headers = {"Authorization": f"Bearer {token}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, headers=headers, connector=connector) as http:
        client = ServiceClient(http, url, token)
        large = Held(4096, 0.0, jobs=1)
        yield _Greedy(http, client, await client.run(WORKFLOW, large.params, large.photo()))
