"""`make failover`: another release is deployed over a service at work.

Not named `test_...`: it starts every engine of a stack anew, which takes a minute or two.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from restoration.jobs import AttemptOutcome, JobStatus
from tests.e2e.stack_processes import wait_until, workers
from tests.photos import jpeg, original
from tests.stack import Stack

pytestmark = pytest.mark.real_engine

DEPLOY_S = 240


def test_06_a_deployment_over_running_jobs_loses_none(stack: Stack) -> None:
    """Jobs from before, from meanwhile and from after all succeed, and none is charged a failed
    attempt; every worker is another process."""
    photo = jpeg(original("flower").resize((160, 106)))
    before = set(workers(stack.state_dir).values())
    with stack.client() as client:
        jobs = [client.submit(photo) for _ in range(2)]
        wait_until(lambda: client.get(jobs[0].id).status is JobStatus.RUNNING, timeout_s=60)
        deploying = subprocess.Popen(
            [sys.executable, "-m", "tests.failover.redeploy"],
            env={**os.environ, "RAY_ADDRESS": stack.record.ray_address, "RAY_AUTH_MODE": "token"},
        )
        jobs.append(client.submit(photo, workflow="enlarge"))
        assert deploying.wait(DEPLOY_S) == 0
        jobs.append(client.submit(photo, workflow="enlarge"))
        ended = [client.wait(job.id) for job in jobs]
    assert {job.status for job in ended} == {JobStatus.SUCCEEDED}
    attempts = [attempt.outcome for job in ended for attempt in job.attempts]
    assert AttemptOutcome.FAILED not in attempts
    wait_until(lambda: len(workers(stack.state_dir)) == 2, timeout_s=DEPLOY_S)
    assert before.isdisjoint(workers(stack.state_dir).values())
