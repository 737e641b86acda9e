"""From no GPU node to several and back: on Ray's fake cloud.

The autoscaler, the dispatcher, the workers, ComfyUI and the services are the real ones; nodes are
processes, and GPUs are numbers. One cluster goes through it, and each test looks at a part.
"""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml

from actors.submission import SubmissionRequest
from comfy_pool.provision import EngineInstall
from persistence.embedded.local import LocalServices
from persistence.migrate import upgrade
from restoration.jobs import Job, JobStatus
from restoration.settings import load_settings
from serve_app.services import Services, open_services
from serve_app.stack import service_variables
from tests.fake_cloud import DEADLINE_S, LOOK_S, ROOT, EngineProcess, FakeCloud, wait_for
from tests.photos import original
from tests.stack import free_port

NODES = 2
WORKERS = 3


@dataclass
class Fleet:
    """The cluster with the service on it, and the door for submissions."""

    cloud: FakeCloud
    services: Services

    async def submit(self, count: int, seconds: float) -> list[UUID]:
        """Jobs that hold a GPU for so long, and no core."""
        out = io.BytesIO()
        original("china").resize((64, 64)).save(out, "PNG")
        params = {"seconds": seconds, "size": 64}
        request = SubmissionRequest("alice", out.getvalue(), "held", params)
        submit = self.services.submission.submit
        return [(await submit(request)).job.id for _ in range(count)]

    async def reach(self, ids: Sequence[UUID], status: JobStatus) -> list[Job]:
        """The jobs, when all of them have come there."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                jobs = [await self.services.jobs.get(job_id) for job_id in ids]
                if all(job.status is status for job in jobs):
                    return jobs
                assert not any(job.status is JobStatus.FAILED for job in jobs), jobs
                await asyncio.sleep(LOOK_S)

    async def has_nodes(self, count: int) -> None:
        """Return when so many nodes are there, the head not counted."""
        await asyncio.to_thread(wait_for, lambda: len(self.cloud.nodes()) == count)

    async def has_engines(self, count: int) -> set[EngineProcess]:
        """The engines, when there are so many."""
        await asyncio.to_thread(wait_for, lambda: len(self.cloud.engines()) == count)
        return self.cloud.engines()


@dataclass
class Burst:
    """What was seen of three jobs for a cluster without a node."""

    nodes_before: int
    jobs: list[Job]
    engines: set[EngineProcess]


@pytest.fixture(scope="module")
async def fleet(engine_install: EngineInstall) -> AsyncIterator[Fleet]:
    """A head with the service on it, no node, and nothing to do."""
    async with AsyncExitStack() as stack:
        local = stack.enter_context(LocalServices(stack.enter_context(_folder())))
        upgrade(local.urls.database_url)
        folder = stack.enter_context(_folder())
        environ = _environ(folder, local)
        cloud = FakeCloud(folder, environ, NODES)
        stack.callback(cloud.close)
        cloud.start_head()
        cloud.deploy(_serve_config())
        services = open_services(load_settings(environ))
        stack.push_async_callback(services.aclose)
        yield Fleet(cloud, services)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _environ(folder: Path, local: LocalServices) -> dict[str, str]:
    environ = {name: os.environ[name] for name in ("PATH", "HOME")}
    for role in ("postgres", "redis", "s3"):
        environ |= service_variables(role, local.urls)
    password, _, address = local.urls.redis_url.partition("://")[2].partition("@")
    return environ | {
        "LOCAL_ISSUER_URL": "http://127.0.0.1:9",  # nobody asks for a token here
        "COMFY_RESTORE_STATE": str(folder / "state"),
        "WORKFLOWS_DIR": str(ROOT / "benchmarks" / "workflows"),
        "CUSTOM_NODES_DIR": str(ROOT / "benchmarks"),
        "WARM_UP_WORKFLOW": "held",
        # A machine that is busy with other tests is slow, not dead.
        "LEASE_S": "20",
        "ENGINE_START_TIMEOUT_S": str(DEADLINE_S),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all on loopback
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_REDIS_ADDRESS": address.partition("/")[0],
        "RAY_REDIS_PASSWORD": password.removeprefix(":"),
    }


def _serve_config() -> dict[str, object]:
    """serve_config.yaml with the sizes and delays of a test."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    [application] = config["applications"]
    sizes = {"workers_max": WORKERS, "worker_cpus": 1, "worker_depth": 0}
    delays = {"upscale_delay_s": 0.5, "downscale_delay_s": 4}
    replicas = {"ingress_replicas": 1, "dispatcher_replicas": 1}
    application["args"] |= sizes | delays | replicas
    return config


@pytest.fixture(scope="module")
async def burst(fleet: Fleet) -> Burst:
    before = len(fleet.cloud.nodes())
    ids = await fleet.submit(WORKERS, seconds=6)
    await fleet.has_nodes(NODES)
    engines = await fleet.has_engines(WORKERS)
    return Burst(before, await fleet.reach(ids, JobStatus.SUCCEEDED), engines)


async def test_03_a_burst_brings_nodes_and_the_jobs_end(burst: Burst) -> None:
    """Jobs for a cluster without a GPU node get all nodes that they need, and each runs once."""
    assert burst.nodes_before == 0
    assert [(job.status, job.attempt) for job in burst.jobs] == [(JobStatus.SUCCEEDED, 1)] * WORKERS


async def test_05_each_engine_has_its_gpu_and_its_port(fleet: Fleet, burst: Burst) -> None:
    """On each node the first GPU's engine has the node's first port, the second's the next, and
    each sees its own GPU alone."""
    places = {fleet.cloud.place(engine.port): engine.gpus for engine in burst.engines}

    assert len(places) == WORKERS
    assert all(gpus == str(slot) for (_, slot), gpus in places.items())
    assert {node for node, _ in places} == set(range(1, NODES + 1))


async def test_03_nodes_go_when_nothing_waits(fleet: Fleet, burst: Burst) -> None:
    """After the last job the fleet is at zero, engines included."""
    assert burst.jobs
    await fleet.has_nodes(0)
    assert await fleet.has_engines(0) == set()
