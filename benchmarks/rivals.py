"""Compare the service with alternatives on the same machine, in jobs per second.

Each has a ComfyUI that does the same work: the service one in its stack, the others a bare one.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.answers import Answers, answers
from benchmarks.figures import HERE, Bench, Figure, Goal
from benchmarks.processes import running, wait_until_ready
from benchmarks.service_client import WORKFLOW, NoAnswer, ServiceClient
from benchmarks.throughput import ROUNDS, SMALL, bare_comfyui
from serve_app.local.temporary import free_port
from workflows.catalog import load_catalog
from workflows.render import render

IN_FLIGHT = 6
# The SDK polls ever less often; with this many jobs the engine does not wait for it.
POLLED_IN_FLIGHT = 16
WAIT_S = 30
JOB_S = 120  # Only a job that its worker has dropped takes longer.
WEB_PROCESSES = 2

Restore = Callable[[bytes], Awaitable[bytes]]


def usual_service(bench: Bench) -> Sequence[Figure]:
    """Compare with the same service built on FastAPI and Celery, see `benchmarks.usual`."""
    return asyncio.run(_usual(bench))


def api_proxy(bench: Bench) -> Sequence[Figure]:
    """Compare with the official proxy for ComfyUI's newer API, driven by its own SDK."""
    return asyncio.run(_proxied(bench))


async def _usual(bench: Bench) -> list[Figure]:
    async with AsyncExitStack() as stack:
        ours = await stack.enter_async_context(ServiceClient.to(bench.stack))
        comfyui_url = await stack.enter_async_context(bare_comfyui())
        url = stack.enter_context(_usual_processes(bench.environ, comfyui_url))
        http = await stack.enter_async_context(aiohttp.ClientSession())

        async def theirs(photo: bytes) -> bytes:
            async with asyncio.timeout(JOB_S):
                return await _through_usual(http, url, photo)

        pairs = await _compare(bench, "usual", ours, theirs, IN_FLIGHT)
    assert not any(each.wrong for pair in pairs for each in pair), "a wrong answer"
    return [_ratio("jobs/s over FastAPI and Celery", pairs, 1.3)]


async def _proxied(bench: Bench) -> list[Figure]:
    from comfy_sdk import AsyncComfy  # installed only by `make bench`

    async with AsyncExitStack() as stack:
        ours = await stack.enter_async_context(ServiceClient.to(bench.stack))
        comfyui_url = await stack.enter_async_context(bare_comfyui())
        os.environ["COMFY_BASE_URL"] = stack.enter_context(_proxy_process(comfyui_url))
        client = await stack.enter_async_context(AsyncComfy())

        async def theirs(photo: bytes) -> bytes:
            return await _through_sdk(client, photo)

        pairs = await _compare(bench, "proxy", ours, theirs, POLLED_IN_FLIGHT)
    of_proxy = sum(proxy.wrong for _, proxy in pairs)
    return [
        _ratio("jobs/s over comfy-api-proxy", pairs, 1.0),
        Figure(
            "wrong answers beside comfy-api-proxy",
            [our.wrong for our, _ in pairs],
            Goal(0, at_least=False),
            parts=f"of {SMALL.jobs} each; the proxy's, in all: {of_proxy}",
        ),
    ]


async def _compare(
    bench: Bench, name: str, client: ServiceClient, theirs: Restore, in_flight: int
) -> list[tuple[Answers, Answers]]:
    async def ours(photo: bytes) -> bytes:
        return await client.restore(SMALL, photo)

    pairs = []
    for n in range(ROUNDS):
        pair = (
            await answers(ours, SMALL, IN_FLIGHT),
            await answers(theirs, SMALL, in_flight),
        )
        told = " over ".join(f"{each.per_s:.2f}/s ({each.wrong} wrong)" for each in pair)
        bench.say(f"  {name}, round {n + 1}: {told}")
        pairs.append(pair)
    return pairs


def _ratio(name: str, pairs: Sequence[tuple[Answers, Answers]], at_least: float) -> Figure:
    ours = statistics.median(pair[0].per_s for pair in pairs)
    theirs = statistics.median(pair[1].per_s for pair in pairs)
    return Figure(
        f"{name}, {SMALL.side}x{SMALL.side}, {SMALL.seconds:g} s",
        [pair[0].per_s / pair[1].per_s for pair in pairs],
        Goal(at_least, at_least=True),
        parts=f"{ours:.2f}/s over {theirs:.2f}/s",
    )


async def _through_usual(http: aiohttp.ClientSession, url: str, photo: bytes) -> bytes:
    form = aiohttp.FormData({"params": json.dumps(SMALL.params)})
    form.add_field("image", photo, filename="photo.jpg")
    async with http.post(f"{url}/jobs", data=form) as answer:
        answer.raise_for_status()
        job = await answer.json()
    while job["status"] in {"queued", "running"}:
        wait = {"wait_s": WAIT_S}
        async with http.get(f"{url}/jobs/{job['id']}", params=wait) as answer:
            answer.raise_for_status()
            job = await answer.json()
    if job["status"] != "succeeded":
        raise NoAnswer(job["status"])
    async with http.get(f"{url}/jobs/{job['id']}/result") as answer:  # follows a redirect to S3
        answer.raise_for_status()
        return await answer.read()


async def _through_sdk(client: Any, photo: bytes) -> bytes:
    from comfy_sdk.exceptions import ComfyError

    held = load_catalog(more=HERE / "workflows").find(WORKFLOW)
    target, output = held.manifest.image, held.manifest.output
    workflow = client.workflows.from_json(render(held, held.resolve(SMALL.params), "", "result"))
    workflow.set_input(
        target.node, target.input, client.assets.from_bytes(photo, filename="photo.jpg")
    )
    try:
        job = await client.run(workflow)
        [saved] = job.get_outputs(output.node)
        return bytes(await saved.to_bytes())
    except ComfyError as error:
        raise NoAnswer(str(error)) from error


@contextmanager
def _usual_processes(environ: Mapping[str, str], comfyui_url: str) -> Iterator[str]:
    port = free_port()
    named = {
        **environ,
        "COMFYUI_URL": comfyui_url,
        "PYTHONPATH": str(HERE.parent),
        "PYTHONWARNINGS": "ignore",  # Celery warns when run as root.
    }
    python = (sys.executable, "-m")
    web = (
        *python,
        *("uvicorn", "benchmarks.usual.web:app", "--log-level", "warning"),
        *("--port", str(port), "--workers", str(WEB_PROCESSES)),
    )
    worker = (
        *python,
        *("celery", "--quiet", "--app", "benchmarks.usual.worker", "worker", "--pool", "solo"),
        *("--loglevel", "WARNING", "--without-gossip", "--without-mingle"),
    )
    table = [*python, "benchmarks.usual.stores"]
    subprocess.run(table, env={**os.environ, **named}, check=True)
    url = f"http://127.0.0.1:{port}"
    with running(web, named), running(worker, named):
        wait_until_ready(f"{url}/openapi.json")
        yield url


@contextmanager
def _proxy_process(comfyui_url: str) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    proxy = Path(sys.executable).with_name("comfy-api-proxy")
    with tempfile.TemporaryDirectory(prefix="comfy-bench-") as folder:
        options = ("--comfyui", comfyui_url, "--port", str(port), "--state-dir", folder)
        with running((proxy, *options), {}):
            wait_until_ready(f"{url}/api/v2/health")
            yield url
