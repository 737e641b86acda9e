"""Compare the job states read per second through Ray Serve with plain uvicorn."""

from __future__ import annotations

import asyncio
import io
import statistics
from collections.abc import Sequence

import aiohttp
from PIL import Image

from benchmarks.figures import Bench, Figure, Goal
from benchmarks.load import Load, apply_load
from benchmarks.plain import plain_service

CLIENTS = 16
ROUNDS, ROUND_S = 5, 4.0
PROCESSES = 1  # one for each ingress replica of the stack


def status_reads(bench: Bench) -> Sequence[Figure]:
    """Let many clients read one ended job, from both services in turns."""
    stack = bench.stack
    with stack.client("reader") as client:
        job_id = client.wait(client.submit(_photo(), workflow="enlarge").id).id
    path, token = f"/api/v1/restorations/{job_id}", stack.token("reader")
    issuer = stack.record.issuer
    assert issuer is not None
    with plain_service({**bench.environ, "LOCAL_ISSUER_URL": issuer}, PROCESSES) as plain_url:
        rounds = asyncio.run(_rounds(stack.record.url + path, plain_url + path, token))
    ours, plain = zip(*rounds, strict=True)
    return [
        Figure(
            "status reads/s, over plain uvicorn",
            [through_ray.per_s / bare.per_s for through_ray, bare in rounds],
            Goal(0.5, at_least=True, tolerance=0.1),
            parts=f"{_median(ours):.0f}/s over {_median(plain):.0f}/s",
        )
    ]


def _photo() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "grey").save(out, "PNG")
    return out.getvalue()


def _median(loads: Sequence[Load]) -> float:
    return statistics.median(load.per_s for load in loads)


async def _rounds(url: str, plain_url: str, token: str) -> list[tuple[Load, Load]]:
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(headers=headers) as http:

        async def read(url: str) -> Load:
            async def call() -> None:
                async with http.get(url) as answer:
                    await answer.read()
                    answer.raise_for_status()

            return await apply_load(call, CLIENTS, ROUND_S)

        return [(await read(url), await read(plain_url)) for _ in range(ROUNDS)]
