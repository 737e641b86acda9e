"""The service on a Ray cluster of this machine, for tests that submit jobs and remove nodes.

Dispatcher, workers, ComfyUI, the services and, where there is one, the autoscaler are real. Nodes
are processes, and GPUs are only counted.
"""

from __future__ import annotations

import asyncio
import io
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Generic, TypeVar
from uuid import UUID

import yaml

from actors.submission.requests import SubmissionRequest
from persistence.embedded.local import LocalServices
from persistence.postgres.migrate import upgrade
from restoration.jobs import Job, JobStatus
from restoration.settings import load_settings
from restoration.workers import Stage
from serve_app.auth.local_issuer import LOCAL_AUDIENCE, IssuerServer, mint_token
from serve_app.client import RestorationClient
from serve_app.local.stack import service_variables
from serve_app.local.temporary import free_port
from serve_app.services import Services, open_services
from tests.support.fake_cloud import FakeCloud
from tests.support.photos import original
from tests.support.polling import wait_until
from tests.support.ray_cluster import DEADLINE_S, LOOK_S, ROOT, EngineProcess, RayCluster
from tests.support.two_nodes import GPUS, TwoNodes

NODES = 2
WORKERS = 3
KEYS = "issuer"

Cluster = TypeVar("Cluster", bound=RayCluster)


def photo() -> bytes:
    out = io.BytesIO()
    original("china").resize((64, 64)).save(out, "PNG")
    return out.getvalue()


def holding(seconds: float) -> dict[str, float]:
    """Return the parameters of a job that holds a GPU for `seconds` and uses no core."""
    return {"seconds": seconds, "size": 64}


@dataclass
class Service(Generic[Cluster]):
    """A cluster with the service on it, and the ways to submit jobs to it."""

    cluster: Cluster
    services: Services
    config: dict[str, Any]

    async def deploy(self, environ: dict[str, str]) -> None:
        """Deploy the service again, with `environ` added to the environment of every replica."""
        [application] = self.config["applications"]
        application["runtime_env"] = {"env_vars": environ}
        await asyncio.to_thread(self.cluster.deploy, self.config)

    async def has_workers(self, *versions: str) -> None:
        """Return when the engines of the listed workers have exactly these versions."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                roll = await self.services.workers.roll()
                if sorted(each.report.engine_version for each in roll.workers) == sorted(versions):
                    return
                await asyncio.sleep(LOOK_S)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config['http_options']['port']}"

    def client(self) -> RestorationClient:
        """Return a client of the HTTP API for the user alice."""
        issuer = self.cluster.environ["LOCAL_ISSUER_URL"]
        token = mint_token(self.cluster.folder / KEYS, issuer, LOCAL_AUDIENCE, "alice")
        return RestorationClient(self.url, token)

    async def submit(self, count: int, seconds: float) -> list[UUID]:
        """Submit `count` jobs that hold a GPU for `seconds`, without the cluster; return their
        ids."""
        request = SubmissionRequest("alice", photo(), "held", holding(seconds))
        submit = self.services.submission.submit
        return [(await submit(request)).job.id for _ in range(count)]

    async def reach(self, ids: Sequence[UUID], status: JobStatus) -> list[Job]:
        """Return the jobs when all of them have this status."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                jobs = [await self.services.jobs.get(job_id) for job_id in ids]
                if all(job.status is status for job in jobs):
                    return jobs
                assert not any(job.status is JobStatus.FAILED for job in jobs), jobs
                await asyncio.sleep(LOOK_S)

    async def has_engines(self, count: int) -> set[EngineProcess]:
        """Return the engines when there are exactly `count`."""
        await asyncio.to_thread(
            wait_until, lambda: len(self.cluster.engines()) == count, DEADLINE_S
        )
        return self.cluster.engines()


class Fleet(Service[FakeCloud]):
    """The service on the fake cloud, with its autoscaler."""

    async def has_nodes(self, count: int) -> None:
        """Return when there are `count` nodes besides the head."""
        await asyncio.to_thread(wait_until, lambda: len(self.cluster.nodes()) == count, DEADLINE_S)

    async def busy_node(self) -> int:
        """Return the number of a node whose engine executes a job; a warm-up does not count."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for worker in (await self.services.workers.roll()).workers:
                    if any(job.stage is Stage.EXECUTING for job in worker.report.in_hand):
                        port = int(worker.report.engine_url.rpartition(":")[2])
                        return self.cluster.place(port)[0]
                await asyncio.sleep(LOOK_S)


@asynccontextmanager
async def running_fleet(workers_min: int = 0) -> AsyncIterator[Fleet]:
    """Run an idle fleet: a head, and GPU nodes only for `workers_min` workers.

    The engine is already installed.
    """
    async with AsyncExitStack() as stack:
        folder, environ = _surroundings(stack)
        # This makes Ray keep all of it on loopback.
        environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        cloud = FakeCloud(folder, environ, max_nodes=NODES)
        stack.callback(cloud.close)
        cloud.start_head()
        sizes = {"workers_min": workers_min, "workers_max": WORKERS, "downscale_delay_s": 4}
        yield Fleet(cloud, *_serve(stack, cloud, sizes))


@asynccontextmanager
async def running_two_nodes() -> AsyncIterator[Service[TwoNodes]]:
    """Run a head with the service on it and an idle GPU node; the engine is already installed."""
    async with AsyncExitStack() as stack:
        cluster = TwoNodes(*_surroundings(stack))
        stack.callback(cluster.close)
        cluster.start_head()
        cluster.start_node()
        sizes = {"workers_max": GPUS, "downscale_delay_s": 600}
        yield Service(cluster, *_serve(stack, cluster, sizes))


def _surroundings(stack: AsyncExitStack) -> tuple[Path, dict[str, str]]:
    """Start the services and an issuer; return a folder and an environment for the cluster."""
    local = stack.enter_context(LocalServices(stack.enter_context(_folder())))
    upgrade(local.urls.database_url)
    folder = stack.enter_context(_folder())
    issuer = stack.enter_context(IssuerServer(folder / KEYS, port=0))
    Thread(target=issuer.serve_forever, daemon=True).start()
    stack.callback(issuer.shutdown)
    return folder, _environ(folder, local, issuer.url)


def _serve(
    stack: AsyncExitStack, cluster: RayCluster, sizes: Mapping[str, float]
) -> tuple[Services, dict[str, Any]]:
    """Deploy the service; return this process's services and the deployed configuration."""
    config = _serve_config(sizes)
    cluster.deploy(config)
    services = open_services(load_settings(cluster.environ))
    stack.push_async_callback(services.aclose)
    return services, config


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _workflows(folder: Path) -> Path:
    """Copy the benchmarks' workflows, and allow `held` three attempts so that it survives a lost
    node."""
    shutil.copytree(ROOT / "benchmarks" / "workflows", folder)
    manifest = folder / "held" / "manifest.toml"
    text = manifest.read_text()
    manifest.write_text(text.replace("max_attempts = 1\n", "max_attempts = 3\n"))
    return folder


def _environ(folder: Path, local: LocalServices, issuer: str) -> dict[str, str]:
    environ = {name: os.environ[name] for name in ("PATH", "HOME")}
    for role in ("postgres", "redis", "s3"):
        environ |= service_variables(role, local.urls)
    password, _, address = local.urls.redis_url.partition("://")[2].partition("@")
    return environ | {
        "LOCAL_ISSUER_URL": issuer,
        "COMFY_RESTORE_STATE": str(folder / "state"),
        "WORKFLOWS_DIR": str(_workflows(folder / "workflows")),
        "CUSTOM_NODES_DIR": str(ROOT / "benchmarks"),
        "WARM_UP_WORKFLOW": "held",
        # A proxy or a worker on a machine that is busy with other tests is slow, not dead.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "LEASE_S": "20",
        "ENGINE_START_TIMEOUT_S": str(DEADLINE_S),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_REDIS_ADDRESS": address.partition("/")[0],
        "RAY_REDIS_PASSWORD": password.removeprefix(":"),
    }


def _serve_config(sizes: Mapping[str, float]) -> dict[str, Any]:
    """Return serve_config.yaml with the sizes and delays of a test."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    [application] = config["applications"]
    workers = {"worker_cpus": 1, "worker_depth": 0, "upscale_delay_s": 0.5}
    replicas = {"ingress_replicas": 1, "dispatcher_replicas": 1}
    application["args"] |= {**workers, **replicas, **sizes}
    return config
