"""`make failover`: jobs, workers and the service survive the loss of the head.

Not named `test_...`, because it takes some minutes, mostly to start engines. One head dies and
comes back, and each test checks a part of that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import psutil
import pytest
import structlog

from restoration.jobs import AttemptOutcome, Job, JobStatus
from serve_app.schemas.restorations import Restoration
from tests.support.fleet import Service, holding, photo, running_two_nodes
from tests.support.polling import wait_until
from tests.support.ray_cluster import DEADLINE_S, EngineProcess
from tests.support.stack_processes import GPU_WORKER
from tests.support.two_nodes import GPUS, TwoNodes

SHORT_S = 20.0  # still running when the head is killed
LONG_S = 120.0  # still running when the head is back
REPLICA = "ray::ServeReplica:comfy-restore"
ON_THE_HEAD = (
    "ray::ServeController",
    "ray::StatusActor",
    f"{REPLICA}:Ingress",
    f"{REPLICA}:Dispatcher",
    f"{REPLICA}:Maintenance",
)

log = structlog.get_logger(__name__)


@dataclass
class Node:
    """The workers and engines on the GPU node."""

    workers: set[psutil.Process]
    engines: set[EngineProcess]


@dataclass
class Story:
    """Observations of a head that was killed under two jobs and came back."""

    before: Node
    after: Node
    short: Job
    long: Job
    meanwhile: Job
    over_http: Restoration


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[Service[TwoNodes]]:
    async with running_two_nodes() as service:
        yield service


@pytest.fixture(scope="module")
async def story(service: Service[TwoNodes]) -> Story:
    cluster = service.cluster
    await service.reach(await service.submit(GPUS, seconds=1), JobStatus.SUCCEEDED)
    await service.has_engines(GPUS)
    await asyncio.to_thread(
        wait_until, lambda: len(cluster.on_node(GPU_WORKER)) == GPUS, DEADLINE_S
    )
    before = _node(cluster)
    long_ids = await service.submit(1, LONG_S)
    short_ids = await service.submit(1, SHORT_S)
    await service.reach([*long_ids, *short_ids], JobStatus.RUNNING)

    cluster.kill_head()
    [short] = await service.reach(short_ids, JobStatus.SUCCEEDED)
    meanwhile_ids = await service.submit(1, seconds=1)
    began = time.monotonic()
    coming_back = asyncio.create_task(asyncio.to_thread(_come_back, service))
    [meanwhile] = await service.reach(meanwhile_ids, JobStatus.SUCCEEDED)
    job_s = time.monotonic() - began
    head_s, http_s = await coming_back
    [still] = [await service.services.jobs.get(job_id) for job_id in long_ids]
    log.info("head_is_back", head_s=head_s, http_s=http_s, job_s=job_s, long_job=still.status)
    over_http = await asyncio.to_thread(_restore_over_http, service)
    [long] = await service.reach(long_ids, JobStatus.SUCCEEDED)
    return Story(before, _node(cluster), short, long, meanwhile, over_http)


def _node(cluster: TwoNodes) -> Node:
    return Node(cluster.on_node(GPU_WORKER), cluster.engines())


def _come_back(service: Service[TwoNodes]) -> tuple[float, float]:
    """Start the head again; return the seconds until it ran, and until HTTP answered."""
    began = time.monotonic()
    service.cluster.start_head()
    head_s = time.monotonic() - began
    wait_until(lambda: _answers(f"{service.url}/healthz"), DEADLINE_S)
    return head_s, time.monotonic() - began


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _restore_over_http(service: Service[TwoNodes]) -> Restoration:
    """Submit a job over HTTP and wait for its end."""
    with service.client() as client:
        job = client.submit(photo(), workflow="held", params=holding(1))
        return client.wait(job.id)


@pytest.mark.failover
def test_jobs_end_while_there_is_no_head(story: Story) -> None:
    """A worker without a head finishes its job and records it once, at the first attempt."""
    assert _ended(story.short) == [(1, AttemptOutcome.SUCCEEDED)]


@pytest.mark.failover
def test_the_head_s_return_disturbs_no_job(story: Story) -> None:
    """A job that ran all the while ends on its worker at the first attempt."""
    assert _ended(story.long) == [(1, AttemptOutcome.SUCCEEDED)]


@pytest.mark.failover
def test_workers_outlive_the_head(story: Story) -> None:
    """The same processes, with the same engines, work for the new head."""
    assert len(story.before.workers) == len(story.before.engines) == GPUS
    assert story.after == story.before


@pytest.mark.failover
def test_serve_comes_back_with_the_head(story: Story, service: Service[TwoNodes]) -> None:
    """Without another deployment, jobs submitted meanwhile run on a worker from before."""
    assert _ended(story.meanwhile) == [(1, AttemptOutcome.SUCCEEDED)]
    assert story.meanwhile.worker in {story.short.worker, story.long.worker}
    assert story.over_http.status is JobStatus.SUCCEEDED
    for title in ON_THE_HEAD:
        assert len(service.cluster.on_head(title)) == 1, title


def _ended(job: Job) -> list[tuple[int, AttemptOutcome | None]]:
    return [(each.attempt, each.outcome) for each in job.attempts]
