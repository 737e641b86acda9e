"""The composition root: the Serve deployments of the service and their settings.

`serve_config.yaml` names `build`; `start_ray` and `start_service` start the local stack. Arguments
hold sizes only: each replica reads secrets and addresses from its own node's environment.
"""

# No `from __future__ import annotations`: Serve reads the type of `build`'s argument, and would
# pass a plain dict for a type that is only named.

import logging
import os
import signal
from collections.abc import Collection, Sequence
from typing import Any
from uuid import UUID

import ray
from fastapi import FastAPI
from opentelemetry import trace
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray._private.worker import global_worker
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from actors.cluster.handles import APP
from actors.cluster.local import start_on_loopback
from actors.dispatcher import Dispatcher
from actors.execution.pipeline import stages
from actors.gpu_worker import GpuWorker
from actors.leader.autoscaler import keep_target
from actors.maintenance import Maintenance
from actors.observability.logging import configure_logging
from actors.observability.metrics import RayMeter
from actors.observability.tracing import tracer, tracer_provider
from actors.status_actor import NAMESPACE
from actors.submission.batches import SubmittedBatch
from actors.submission.requests import SubmissionRequest
from actors.submission.service import Submitted
from restoration.batches import JobBatch, NewBatch
from restoration.errors import DependencyUnavailable
from restoration.images import MEBIBYTE
from restoration.jobs import Job, NewJob
from restoration.limits.fair_places import current_owner
from restoration.scaling import ScalingPolicy
from restoration.settings import load_settings
from serve_app.app import build_asgi_app
from serve_app.local.record import RayReport
from serve_app.services import open_services

# The delay before a ticket that found all workers full looks again. Serve's default rises to 0.5 s,
# and each look costs the workers a call.
QUICK_ROUTING = {"initial_backoff_s": 0.02, "max_backoff_s": 0.2}


# For one ingress replica: as many as Serve's HAProxy keeps open. An open event stream counts as a
# request, and beyond this number all requests wait; uploads and rates have limits of their own.
MAX_CONNECTIONS = 4096


class PoolArgs(BaseModel):
    """Sizes of the service; the `args` of serve_config.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # not used here; a new value makes Serve replace every replica with the installed version
    release: str = ""
    workers_min: int = Field(1, ge=0)
    workers_max: int = Field(1, ge=1)
    # 1 on GPU nodes; 0 where ComfyUI runs on the CPU, a fraction to share a GPU
    worker_gpus: float = Field(1, ge=0)
    worker_cpus: float = Field(1, ge=0)
    # jobs that a worker holds ready behind the executing one; 0: none
    worker_depth: int = Field(1, ge=0)
    # batch jobs for each worker; every interactive job counts as a worker of its own
    jobs_per_worker: float = Field(4, gt=0)
    # idle workers kept for the next interactive job
    warm_workers: int = Field(0, ge=0)
    # how long the demand must stay higher, or lower, before workers are started, or stopped
    upscale_delay_s: float = Field(2, ge=0)
    downscale_delay_s: float = Field(120, ge=0)
    ingress_replicas: int = Field(2, ge=1)
    dispatcher_replicas: int = Field(2, ge=1)
    # longer than the longest job, which scale-down would otherwise hand back (Serve's default: 20
    # s)
    drain_s: float = Field(3600, gt=0)

    @property
    def scaling(self) -> ScalingPolicy:
        return ScalingPolicy(
            jobs_per_worker=self.jobs_per_worker,
            min_workers=self.workers_min,
            max_workers=self.workers_max,
            warm_workers=self.warm_workers,
            upscale_delay_s=self.upscale_delay_s,
            downscale_delay_s=self.downscale_delay_s,
        )


class Ingress:
    """The HTTP ingress. Batch scripts call the same service through the methods of its handle."""

    def __init__(self, *_others: DeploymentHandle[Any]) -> None:
        """Open the services.

        `_others` are the deployments that must run beside the ingress, which makes no calls to
        them.
        """
        settings = load_settings(os.environ)
        configure_logging(settings.log_format)
        trace.set_tracer_provider(tracer_provider(settings.otlp_endpoint, "ingress"))
        self._services = open_services(settings, RayMeter())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_asgi_app(self._services)

    async def submit(self, request: SubmissionRequest) -> Submitted:
        current_owner.set(request.owner)
        return await self._services.submission.submit(request)

    async def check(self, request: SubmissionRequest) -> None:
        """Check everything that can be checked without the picture.

        Raises InvalidRequest and its subclasses.
        """
        self._services.submission.check(request)

    async def prepare(self, request: SubmissionRequest, job_id: UUID) -> NewJob:
        """Check and store a picture, and return its job for `record_batch`. It records nothing."""
        current_owner.set(request.owner)
        submission = self._services.submission
        with tracer.start_as_current_span("submit"):
            checked = submission.check(request)
            photo = await submission.store_photo(request.image, job_id, checked)
            return await submission.make_job(checked, job_id, photo)

    async def record_batch(self, new: NewBatch, jobs: Sequence[NewJob]) -> SubmittedBatch:
        current_owner.set(new.owner)
        return await self._services.batch_submission.record(new, jobs)

    async def batch(self, batch_id: UUID) -> JobBatch:
        return await self._services.batches.get(batch_id)

    async def cancel_batch(self, batch_id: UUID) -> JobBatch:
        return await self._services.batches.request_cancel(batch_id)

    async def known(self, job_ids: Sequence[UUID]) -> Collection[UUID]:
        return {job.id for job in await self._services.jobs.find(job_ids)}

    async def ended(self, job_ids: Sequence[UUID]) -> Sequence[Job]:
        return await self._services.jobs.ended(job_ids)

    async def cancel(self, job_id: UUID) -> Job:
        return await self._services.jobs.request_cancel(job_id)

    async def result(self, job_id: UUID) -> bytes:
        """Return the bytes of the result. Raises ResultNotReady unless the job succeeded."""
        job = await self._services.jobs.get(job_id)
        current_owner.set(job.owner)
        return await self._services.blobs.get(job.result())


def build(args: PoolArgs) -> Application:
    """Return the whole service as one Serve application."""
    workers = _workers(args).bind(
        whole_gpu=args.worker_gpus >= 1, depth=args.worker_depth, drain_s=args.drain_s
    )
    # As many tickets as the largest pool has places for. A ticket that waits in Serve costs Serve
    # and the workers calls, and a worker that has ended a job needs no ticket for the next one.
    dispatcher = _deployment(Dispatcher, args.dispatcher_replicas).bind(
        workers,
        window=stages(args.worker_depth) * args.workers_max,
        scaling=args.scaling,
    )
    ingress = _deployment(
        serve.ingress()(Ingress),
        args.ingress_replicas,
        max_ongoing_requests=MAX_CONNECTIONS,
        # A draining replica would wait for open event streams; their clients reconnect and resume.
        graceful_shutdown_timeout_s=10,
    )
    maintenance = _deployment(Maintenance, replicas=1).bind()
    application: Application = ingress.bind(dispatcher, maintenance)
    return application


def _deployment(kind: type, replicas: int, **options: Any) -> serve.Deployment:
    return serve.deployment(
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2,
        **options,
    )(kind)


def _workers(args: PoolArgs) -> serve.Deployment:
    return serve.deployment(
        ray_actor_options={"num_gpus": args.worker_gpus, "num_cpus": args.worker_cpus},
        # The dispatcher sets the number of replicas. The policy keeps that number, so that a new
        # deployment of the service does not reset it, and the limits below hold.
        autoscaling_config={
            "min_replicas": args.workers_min,
            "max_replicas": args.workers_max,
            # With no replicas Serve calls no policy: it starts one if the number of tickets,
            # aggregated over the last 30 s, is above 0. The minimum drops to 0 after any moment
            # without tickets; a mean would start a worker after the last job has ended.
            "aggregation_function": "min",
            "policy": {"policy_function": f"{keep_target.__module__}:{keep_target.__name__}"},
        },
        max_ongoing_requests=stages(args.worker_depth),
        request_router_config=QUICK_ROUTING,
        graceful_shutdown_timeout_s=args.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
    )(GpuWorker)


# Set before Ray starts, since the processes that it starts read them.
LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # glibc's heaps, by default one for each thread; each keeps the most that it ever needed
    "MALLOC_ARENA_MAX": "2",
    # Returns the memory of a freed photo or result to the system at once. By default glibc raises
    # both thresholds to the sizes it has seen freed, up to 32 and 64 MiB, and keeps that much in
    # each heap.
    "MALLOC_MMAP_THRESHOLD_": str(MEBIBYTE),
    "MALLOC_TRIM_THRESHOLD_": str(MEBIBYTE),
    # a killed proxy is replaced in 4 s instead of 30
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
    # a proxy that needs longer than Serve's 5 s to start on a busy machine is not replaced
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # removes the request headers by which clients could steer Serve
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.asgi.middleware:serve_edge",
}
# Defaults that the environment may override: `make bench ONLY=serve` compares the alternatives.
LOCAL_DEFAULTS = {
    # with a separate thread for user code, each event of a stream would cross threads and be queued
    # without a limit
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
OBJECT_STORE_BYTES = 512 * 1024 * 1024


def start_ray() -> RayReport:
    """Start Ray on this machine, owned by this process, and return its addresses.

    Ray listens on loopback only, and requires its token even there. Raises DependencyUnavailable if
    it does not start.
    """
    os.environ.update({**LOCAL_DEFAULTS, **os.environ, **LOCAL_ENVIRONMENT})
    start_on_loopback()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address="local",
            namespace=NAMESPACE,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray raises nothing narrower for a node that starts slowly
        raise DependencyUnavailable(f"Ray did not start: {error}") from error
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray installs a handler of its own
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # replicas log to files of their own
    [node] = ray.nodes()  # type: ignore[no-untyped-call]
    return RayReport(
        session_dir=own_node().get_session_dir_path(),
        gcs=ray.get_runtime_context().gcs_address,
        metrics=f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics",
    )


def own_node() -> Any:
    """Return Ray's node, which holds the processes that this one started.

    Raises DependencyUnavailable if Ray is not running.
    """
    if global_worker.node is None:
        raise DependencyUnavailable("Ray is not running")
    return global_worker.node


def start_service(args: PoolArgs, port: int) -> None:
    """Run the service on this process's Ray, and return once every replica is ready.

    Raises DependencyUnavailable if the service does not become ready.
    """
    # No time limit for requests: it would cut event streams.
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": None})
    try:
        serve.run(build(args), name=APP, route_prefix="/", external_scaler_enabled=True)
    except RuntimeError as error:
        # the last line of Serve's message about each deployment that is not healthy
        reasons = [
            each.message.strip().splitlines()[-1]
            for each in serve.status().applications[APP].deployments.values()
            if each.status != "HEALTHY" and each.message
        ]
        reasons.append(f"logs are in {ray.get_runtime_context().get_session_name()}")
        raise DependencyUnavailable(f"the service did not start: {'; '.join(reasons)}") from error


def stop_service() -> None:
    """Drain and stop the service, if it was started.

    Serve's own processes end with Ray: `serve.shutdown` would only add seconds, and an error about
    the controller that it kills.
    """
    if ray.is_initialized() and APP in serve.status().applications:
        serve.delete(APP)
