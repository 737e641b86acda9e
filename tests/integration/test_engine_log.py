"""Log lines of an engine carry the job that it executes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from comfy_pool.engine import ComfyEngine
from comfy_pool.process.hosts import AttachedHost, OwnedHost
from tests.fakes import graphs
from tests.fakes.comfyui import serving
from tests.fakes.comfyui_engines import DEADLINE_S, LIMITS, stand_in
from tests.fakes.comfyui_worker import Script
from tests.fakes.graphs import ignore

TALKS = """
import threading, time
def talk():
    while True:
        print("tick", flush=True)
        time.sleep(0.01)
threading.Thread(target=talk, daemon=True).start()
"""


class NotedHost(AttachedHost):
    def __init__(self, base_url: str) -> None:
        super().__init__(base_url)
        self.told: list[Mapping[str, str | int]] = []

    def executes(self, log_context: Mapping[str, str | int]) -> None:
        self.told.append(log_context)


@pytest.mark.metrics
async def test_the_host_is_told_what_is_executed(tmp_path: Path) -> None:
    """Each run is reported in turn, even with another one queued, and nothing after the last."""
    first, second = (
        replace(graphs.through(graphs.hold(0.1)), log_context={"job_id": name})
        for name in ("one", "two")
    )
    async with asyncio.timeout(DEADLINE_S), serving(tmp_path, Script()) as fake:
        host = NotedHost(fake.url)
        async with ComfyEngine(host, LIMITS) as engine:
            await asyncio.gather(engine.run(first, ignore), engine.run(second, ignore))
    jobs = [told.get("job_id") for told in host.told]
    assert set(jobs) == {"one", "two", None}
    assert jobs[-1] is None


@pytest.mark.metrics
async def test_its_lines_carry_the_job(tmp_path: Path) -> None:
    """Lines carry the job only while its run is executed."""
    command = stand_in(tmp_path)
    program = command.app_dir / "main.py"
    program.write_text(TALKS + program.read_text())
    context: dict[str, str | int] = {"job_id": "a1", "attempt": 2, "trace_id": "4bf9"}
    run = replace(graphs.through(graphs.hold(0.5)), log_context=context)
    with capture_logs() as logged:
        async with asyncio.timeout(DEADLINE_S), ComfyEngine(OwnedHost(command)) as engine:
            before = len(logged)
            await engine.run(run, ignore)
    said = [line for line in logged if line["event"] == "engine_says"]
    during = [line for line in said if "job_id" in line]
    assert during
    assert all({key: line.get(key) for key in context} == context for line in during)
    assert not [line for line in logged[:before] if "job_id" in line]
    assert len(during) < len(said)
