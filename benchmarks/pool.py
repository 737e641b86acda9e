"""Measure four saturated workers: whether their engines ever wait, or load models needlessly.

The busy share is measured inside ComfyUI, from the start to the end of each prompt. The mixed load
has four workflows, each with a model that takes two seconds to load if another one is loaded. It is
compared with the same graphs under names for which the service knows no model, so that any free
worker takes the next job.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.figures import WORKFLOWS, Bench, Figure, Goal
from benchmarks.service_client import WORKFLOW, Held, ServiceClient
from comfy_pool.install.engine import models_dir
from restoration.settings import NodeSettings
from serve_app.local.temporary import LocalStack

WORKERS = 4
ROUNDS = 3

SATURATING = Held(64, 0.2, jobs=WORKERS * 60)
HELD = {"size": 64, "seconds": 15.0}  # while the queue fills; one job executes, the next is staged
AT_ONCE = 2 * WORKERS
IN_FLIGHT = WORKERS * 4  # excluded at the end, when the queue runs empty

MODELS = "abcd"
LOAD_S, EXECUTE_S = 2.0, 0.2
MIXED_JOBS = 96
OWNERS = 8

_MODEL = """
[[models]]
name = "{name}.safetensors"
folder = "benchmark"
sha256 = "{sha256}"
size_bytes = {size}
"""


def busy_pool(bench: Bench) -> Sequence[Figure]:
    """Measure both figures on one pool."""
    with (
        _mixed_workflows() as workflows,
        bench.new_stack(WORKERS, {"MAX_UPLOADS_IN_FLIGHT": str(MIXED_JOBS)}, workflows) as on,
    ):
        return asyncio.run(_measure(bench, on))


async def _measure(bench: Bench, stack: LocalStack) -> list[Figure]:
    async with AsyncExitStack() as clients:
        owners = [
            await clients.enter_async_context(ServiceClient.to(stack, f"owner-{n}"))
            for n in range(OWNERS)
        ]
        return [await _busy(bench, stack, owners[0]), await _mixed(bench, owners)]


async def _busy(bench: Bench, stack: LocalStack, client: ServiceClient) -> Figure:
    """Measure with a queue that is full from the start: it fills while every engine is held."""
    photo = SATURATING.photo()
    shares = []
    for n in range(ROUNDS):
        held = await _submitted(client, HELD, photo, 2 * WORKERS)
        jobs = await _submitted(client, SATURATING.params, photo, SATURATING.jobs)
        await client.ended(held)
        began = time.monotonic()
        await client.ended(jobs[:-IN_FLIGHT])
        shares.append(statistics.mean(_executing(stack, (began, time.monotonic()))))
        await client.ended(jobs)
        bench.say(f"  executing, round {n + 1}: {100 * shares[-1]:.1f} %")
    goal = Goal(0.98, at_least=True, tolerance=0.01)
    return Figure(f"share of time that {WORKERS} engines execute, 0.2 s jobs", shares, goal)


async def _submitted(
    client: ServiceClient, params: Mapping[str, float], photo: bytes, count: int
) -> list[dict[str, Any]]:
    """Submit `count` jobs, some at a time, all before a held engine is free."""
    jobs = list[dict[str, Any]]()
    for _ in range(0, count, AT_ONCE):
        submitting = (client.submit(WORKFLOW, params, photo) for _ in range(AT_ONCE))
        jobs += await asyncio.gather(*submitting)
    return jobs


def _executing(stack: LocalStack, window: tuple[float, float]) -> Iterator[float]:
    """Yield for each engine the share of the window during which it executed."""
    begin, end = window
    for noted in stack.state_dir.glob("engines/*/benchmark-executions.txt"):
        spans = (map(float, line.split()) for line in noted.read_text().splitlines())
        inside = (max(0.0, min(end, ended) - max(begin, began)) for began, ended in spans)
        yield sum(inside) / (end - begin)


async def _mixed(bench: Bench, owners: Sequence[ServiceClient]) -> Figure:
    ratios, rates = [], list[tuple[float, float]]()
    for n in range(ROUNDS):
        blind = await _mixed_rate(owners, "blind", seed=n)
        ours = await _mixed_rate(owners, "known", seed=n)
        bench.say(f"  four models, round {n + 1}: {ours:.2f}/s over {blind:.2f}/s")
        ratios.append(ours / blind)
        rates.append((ours, blind))
    return Figure(
        "mixed load of four workflows: jobs/s over random placement",
        ratios,
        Goal(2.0, at_least=True),
        parts=f"{statistics.median(ours for ours, _ in rates):.2f}/s over "
        f"{statistics.median(blind for _, blind in rates):.2f}/s",
    )


async def _mixed_rate(owners: Sequence[ServiceClient], kind: str, seed: int) -> float:
    """Return the jobs per second for workflows in random order that all wait from the start."""
    names = [f"{kind}-{model}" for model in MODELS] * (MIXED_JOBS // len(MODELS))
    random.Random(seed).shuffle(names)  # noqa: S311 - an order, not a secret
    photo = Held(64, 0.0, jobs=1).photo()
    began = time.monotonic()
    jobs = zip(itertools.cycle(owners), names, strict=False)
    await asyncio.gather(*(owner.run(name, {}, photo) for owner, name in jobs))
    return MIXED_JOBS / (time.monotonic() - began)


@contextmanager
def _mixed_workflows() -> Iterator[Path]:
    """Yield a workflows folder with those of the mixed load; their models exist until the end."""
    models = models_dir(NodeSettings().cache_dir) / "benchmark"
    with tempfile.TemporaryDirectory(prefix="comfy-bench-") as name:
        folder = Path(name)
        shutil.copytree(WORKFLOWS, folder, dirs_exist_ok=True)
        models.mkdir(parents=True, exist_ok=True)  # may be left by a killed run
        try:
            for model in MODELS:
                weights = f"the weights of {model}".encode()
                (models / f"{model}.safetensors").write_bytes(weights)
                spec = _MODEL.format(
                    name=model, sha256=hashlib.sha256(weights).hexdigest(), size=len(weights)
                )
                _write_workflow(folder / f"known-{model}", f"{model}.safetensors", spec)
                _write_workflow(folder / f"blind-{model}", model, "")
            yield folder
        finally:
            shutil.rmtree(models)


def _write_workflow(folder: Path, model: str, spec: str) -> None:
    """Write a copy of `held` with a model in front of the node that holds the GPU."""
    shutil.copytree(WORKFLOWS / WORKFLOW, folder)
    graph = folder / "graph.json"
    changed: Mapping[str, str] = {
        '"image": ["photo", 0], "width": 1024, "height": 1024, "seconds": 0.2': (
            f'"image": ["model", 0], "width": 64, "height": 64, "seconds": {EXECUTE_S}'
        ),
        '  "held": {': (
            '  "model": {"class_type": "BenchmarkModel", "inputs": {"image": ["photo", 0], '
            f'"name": "{model}", "seconds": {LOAD_S}}}}},\n  "held": {{'
        ),
    }
    graph.write_text(_replaced(graph.read_text(), changed))
    manifest = folder / "manifest.toml"
    changed = {
        'name = "held"': f'name = "{folder.name}"',
        '"BenchmarkGpu", ': '"BenchmarkGpu", "BenchmarkModel", ',
        "default = 1024": "default = 64",
    }
    manifest.write_text(_replaced(manifest.read_text(), changed) + spec)


def _replaced(text: str, changes: Mapping[str, str]) -> str:
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text
