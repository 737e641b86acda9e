"""The service on Ray's fake cloud, for tests to submit jobs to and to take nodes from.

The autoscaler, the dispatcher, the workers, ComfyUI and the services are the real ones; nodes are
processes, and GPUs are numbers.
"""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import yaml

from actors.submission import SubmissionRequest
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
    config: dict[str, Any]

    async def deploy(self, environ: dict[str, str]) -> None:
        """The same once more, with more in the environment of every replica."""
        [application] = self.config["applications"]
        application["runtime_env"] = {"env_vars": environ}
        await asyncio.to_thread(self.cloud.deploy, self.config)

    async def has_workers(self, *versions: str) -> None:
        """Return when there are workers with engines of these versions, and no others."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                roll = await self.services.workers.roll()
                if sorted(each.report.engine_version for each in roll.workers) == sorted(versions):
                    return
                await asyncio.sleep(LOOK_S)

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

    async def busy_node(self) -> int:
        """A node with an engine that executes a job."""
        async with httpx.AsyncClient(trust_env=False) as http, asyncio.timeout(DEADLINE_S):
            while True:
                for engine in self.cloud.engines():
                    with suppress(httpx.HTTPError):  # it may be starting, or going
                        queue = (await http.get(f"http://127.0.0.1:{engine.port}/queue")).json()
                        if queue["queue_running"]:
                            return self.cloud.place(engine.port)[0]
                await asyncio.sleep(LOOK_S)


@asynccontextmanager
async def running_fleet(workers_min: int = 0) -> AsyncIterator[Fleet]:
    """A head with the service on it, and nothing to do; no node, unless workers are to stay.

    The engine is installed.
    """
    async with AsyncExitStack() as stack:
        local = stack.enter_context(LocalServices(stack.enter_context(_folder())))
        upgrade(local.urls.database_url)
        folder = stack.enter_context(_folder())
        environ = _environ(folder, local)
        cloud = FakeCloud(folder, environ, NODES)
        stack.callback(cloud.close)
        cloud.start_head()
        config = _serve_config(workers_min)
        cloud.deploy(config)
        services = open_services(load_settings(environ))
        stack.push_async_callback(services.aclose)
        yield Fleet(cloud, services, config)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _workflows(folder: Path) -> Path:
    """The workflows of the benchmarks, with another attempt for jobs whose node is lost."""
    shutil.copytree(ROOT / "benchmarks" / "workflows", folder)
    manifest = folder / "held" / "manifest.toml"
    text = manifest.read_text()
    manifest.write_text(text.replace("max_attempts = 1\n", "max_attempts = 3\n"))
    return folder


def _environ(folder: Path, local: LocalServices) -> dict[str, str]:
    environ = {name: os.environ[name] for name in ("PATH", "HOME")}
    for role in ("postgres", "redis", "s3"):
        environ |= service_variables(role, local.urls)
    password, _, address = local.urls.redis_url.partition("://")[2].partition("@")
    return environ | {
        "LOCAL_ISSUER_URL": "http://127.0.0.1:9",  # nobody asks for a token here
        "COMFY_RESTORE_STATE": str(folder / "state"),
        "WORKFLOWS_DIR": str(_workflows(folder / "workflows")),
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


def _serve_config(workers_min: int) -> dict[str, Any]:
    """serve_config.yaml with the sizes and delays of a test."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    [application] = config["applications"]
    most = {"workers_min": workers_min, "workers_max": WORKERS}
    sizes = most | {"worker_cpus": 1, "worker_depth": 0}
    delays = {"upscale_delay_s": 0.5, "downscale_delay_s": 4}
    replicas = {"ingress_replicas": 1, "dispatcher_replicas": 1}
    application["args"] |= sizes | delays | replicas
    return config
