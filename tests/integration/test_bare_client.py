"""The bare client, the baseline of the benchmarks, does everything that a client must."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from benchmarks.bare_client import Work, end_times_s
from tests.fakes import graphs
from tests.fakes.comfyui import serving

DEADLINE_S = 300
JOBS = 7


async def test_bench_the_bare_client_fetches_every_result(tmp_path: Path) -> None:
    """Each job is uploaded, queued and fetched once, with several in flight at a time."""
    prompt = graphs.through(graphs.steps(2)).render("a name", "a prefix")
    work = Work(graphs.picture(), prompt, image_node="1", output_node=graphs.OUTPUT_NODE)
    async with asyncio.timeout(DEADLINE_S), serving(tmp_path) as fake:
        ended_at_s = await end_times_s(fake.url, work, JOBS, in_flight=3)
        assert ended_at_s == sorted(ended_at_s)
        assert len(ended_at_s) == JOBS
        for call in ("POST /upload", "POST /prompt", "GET /history", "GET /view"):
            assert fake.calls[call] == JOBS
        assert len(list((tmp_path / "output").glob("*/*.png"))) == JOBS
        assert json.dumps(prompt) == json.dumps(work.prompt)
