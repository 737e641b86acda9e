"""`make failover`: roll out another ComfyUI over a busy fleet.

Not named `test_...`, because it takes a few minutes; run it after changes to the life of workers.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from comfy_pool.factory import installed_engine
from comfy_pool.install.engine import EngineInstall
from restoration.jobs import AttemptOutcome, JobStatus
from restoration.settings import load_node_settings
from tests.support.fleet import Fleet, running_fleet

NEXT = "99.0.0"
LONG_S = 90.0  # still running when their workers are ordered to stop, on a slow machine too


@pytest.fixture(scope="module")
def engine() -> EngineInstall:
    """Return the engine that a fleet runs by default."""
    return installed_engine(load_node_settings({}))


@pytest.fixture(scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with running_fleet(workers_min=2) as fleet:
        yield fleet


def _next_release(engine: EngineInstall, folder: Path) -> dict[str, str]:
    """Copy the engine under another version; return the variables that select it
    (docs/upgrades.md)."""
    checkout = Path(shutil.copytree(engine.app_dir, folder / "ComfyUI"))
    (checkout / "comfyui_version.py").write_text(f'__version__ = "{NEXT}"\n')
    return {"COMFYUI_DIR": str(checkout), "COMFYUI_PYTHON": str(engine.python)}


@pytest.mark.upgrades
async def test_a_new_engine_is_rolled_out_over_running_jobs(
    fleet: Fleet, engine: EngineInstall, tmp_path: Path
) -> None:
    """Running jobs, a waiting one and those submitted meanwhile succeed at their first attempt. In
    the end every worker has the new engine, and the next job runs on it. One was ordered to stop
    with a job in hand; otherwise the test would show nothing."""
    await fleet.has_workers(engine.version, engine.version)
    ids = await fleet.submit(2, seconds=LONG_S)
    await fleet.reach(ids, JobStatus.RUNNING)
    ids += await fleet.submit(1, seconds=1)
    await fleet.deploy(_next_release(engine, tmp_path))
    ids += await fleet.submit(2, seconds=1)
    await fleet.reach(ids, JobStatus.SUCCEEDED)
    await fleet.has_workers(NEXT, NEXT)
    ids += await fleet.submit(1, seconds=1)
    jobs = await fleet.reach(ids, JobStatus.SUCCEEDED)
    outcomes = [[attempt.outcome for attempt in job.attempts] for job in jobs]
    assert outcomes == [[AttemptOutcome.SUCCEEDED]] * len(ids)
    assert max(fleet.cluster.jobs_in_hand_when_told_to_go()) == 1
