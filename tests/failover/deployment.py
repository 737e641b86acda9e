"""`make failover`: deploy another release over a busy service.

Not named `test_...`, because it restarts every engine of a stack, which takes some minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from comfy_pool.install.engine import EngineInstall
from restoration.jobs import AttemptOutcome, JobStatus
from serve_app.client import RestorationClient
from serve_app.schemas.restorations import Restoration
from tests.support.fleet import holding, photo
from tests.support.polling import wait_until
from tests.support.ray_cluster import ROOT, jobs_in_hand_when_told_to_go
from tests.support.stack import Stack, running_stack
from tests.support.stack_processes import Process, workers

pytestmark = pytest.mark.real_engine

DEPLOY_S = 240
LONG_S = 90.0  # The jobs still run when their workers are ordered to stop, even on a slow machine.
DRAIN_S = 180  # above the longest job, as in a cluster
WORKERS = 2


@pytest.fixture(scope="module")
def stack(engine_install: EngineInstall) -> Iterator[Stack]:
    """Run a stack of its own, with a workflow that holds a GPU for a given time."""
    environ = {
        "WORKFLOWS_DIR": str(ROOT / "benchmarks" / "workflows"),
        "CUSTOM_NODES_DIR": str(ROOT / "benchmarks"),
        "WARM_UP_WORKFLOW": "held",
        "DRAIN_S": str(DRAIN_S),
    }
    with running_stack(WORKERS, environ) as stack:
        yield stack


@pytest.mark.upgrades
def test_a_deployment_over_running_jobs_loses_none(stack: Stack) -> None:
    """Jobs submitted before, during and after the deployment succeed at their first attempt, and
    every worker is replaced. The first two jobs ran when the deployment began, and a worker was
    ordered to stop with a job in hand; otherwise the test would show nothing."""
    wait_until(lambda: len(workers(stack.state_dir)) == WORKERS, timeout_s=60)
    before = set(workers(stack.state_dir).values())
    logs = [_log_of(worker) for worker in before]
    with stack.client() as client:
        jobs = [_hold(client, LONG_S) for _ in range(WORKERS)]
        wait_until(lambda: _all_run(client, jobs), timeout_s=60)
        deploying = _deploy(stack)
        jobs.append(_hold(client, seconds=1))
        assert deploying.wait(DEPLOY_S) == 0
        jobs.append(_hold(client, seconds=1))
        ended = [client.wait(job.id) for job in jobs]
    outcomes = [[attempt.outcome for attempt in job.attempts] for job in ended]
    assert outcomes == [[AttemptOutcome.SUCCEEDED]] * len(jobs)
    wait_until(lambda: len(workers(stack.state_dir)) == WORKERS, timeout_s=DEPLOY_S)
    assert before.isdisjoint(workers(stack.state_dir).values())
    assert max(jobs_in_hand_when_told_to_go(logs)) >= 1


def _hold(client: RestorationClient, seconds: float) -> Restoration:
    return client.submit(photo(), workflow="held", params=holding(seconds))


def _all_run(client: RestorationClient, jobs: list[Restoration]) -> bool:
    return all(client.get(job.id).status is JobStatus.RUNNING for job in jobs)


def _deploy(stack: Stack) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.failover.redeploy"],
        env={**os.environ, "RAY_ADDRESS": stack.record.ray_address, "RAY_AUTH_MODE": "token"},
    )


def _log_of(worker: Process) -> Path:
    """Return the file that Ray redirects the worker's standard error to."""
    return Path(f"/proc/{worker.pid}/fd/2").readlink()
