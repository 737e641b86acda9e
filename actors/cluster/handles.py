"""Typed wrappers of Serve handles.

Create each handle once: every Serve handle starts a metrics pusher and a long poll.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.cluster.local import find_ray
from actors.submission.batches import SubmittedBatch
from actors.submission.requests import SubmissionRequest
from actors.submission.service import Submitted
from restoration.batches import JobBatch, NewBatch
from restoration.errors import DependencyUnavailable, RestorationError
from restoration.jobs import Job, NewJob

APP = "comfy-restore"
INGRESS = "Ingress"
WORKERS = "GpuWorker"
CONTROLLER_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 120.0  # without a replica Serve waits for one and raises nothing


class ServePool:
    """Serve's target number of GPU workers; implements `actors.leader.autoscaler.Pool`.

    Serve's public API for it is an HTTP endpoint of Ray's dashboard, which some clusters do not
    run. This calls the controller's private methods as that endpoint does, which is one reason why
    the version of Ray is pinned.
    """

    async def size(self) -> int:
        """Return the target number of replicas. Raises DependencyUnavailable."""
        with _unavailable():  # LookupError: the deployment is absent during a redeployment
            details = await _of_controller("get_serve_instance_details")
            size: int = details["applications"][APP]["deployments"][WORKERS]["target_num_replicas"]
            return size

    async def resize(self, workers: int) -> None:
        """Set the target number of replicas. Raises DependencyUnavailable."""
        with _unavailable():
            await _of_controller("update_deployment_replicas", DeploymentID(WORKERS, APP), workers)


async def _of_controller(method: str, *args: object) -> Any:
    async with asyncio.timeout(CONTROLLER_TIMEOUT_S):
        # On a thread: get_actor blocks, for up to a minute, on Ray's control plane.
        controller = await asyncio.to_thread(ray.get_actor, SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
        return await getattr(controller, method).remote(*args)


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (RayError, RayServeException, LookupError, ValueError, TimeoutError) as error:
        raise DependencyUnavailable(f"Serve's controller does not respond: {error!r}") from error


class IngressHandle:
    """Blocking calls to the ingress deployment without HTTP. Safe to use from several threads.

    Each call raises the RestorationError that the ingress raised, or DependencyUnavailable if no
    replica answers.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    def submit(self, request: SubmissionRequest) -> Submitted:
        """Submit a job; see `actors.submission.service.Submission.submit`."""
        submitted: Submitted = _answer(self._handle.submit.remote(request))
        return submitted

    def check(self, request: SubmissionRequest) -> None:
        """Validate all but the picture. Raises InvalidRequest or a subclass."""
        _answer(self._handle.check.remote(request))

    def prepare(self, request: SubmissionRequest, job_id: UUID) -> NewJob:
        """Check and store the picture, and return the job for `record_batch`. Records nothing."""
        job: NewJob = _answer(self._handle.prepare.remote(request, job_id))
        return job

    def record_batch(self, new: NewBatch, jobs: Sequence[NewJob]) -> JobBatch:
        """Record the batch with all its jobs. Idempotent."""
        submitted: SubmittedBatch = _answer(self._handle.record_batch.remote(new, jobs))
        return submitted.batch

    def batch(self, batch_id: UUID) -> JobBatch:
        """Return the batch. Raises BatchNotFound."""
        batch: JobBatch = _answer(self._handle.batch.remote(batch_id))
        return batch

    def cancel_batch(self, batch_id: UUID) -> JobBatch:
        """Request the cancellation of the batch's jobs. Raises BatchNotFound."""
        batch: JobBatch = _answer(self._handle.cancel_batch.remote(batch_id))
        return batch

    def known(self, job_ids: Sequence[UUID]) -> Collection[UUID]:
        """Return the ids for which a job exists."""
        known: Collection[UUID] = _answer(self._handle.known.remote(job_ids))
        return known

    def ended(self, job_ids: Sequence[UUID]) -> Sequence[Job]:
        """Return the jobs whose rows have a final status."""
        jobs: Sequence[Job] = _answer(self._handle.ended.remote(job_ids))
        return jobs

    def cancel(self, job_id: UUID) -> Job:
        """Request the cancellation of a job, and return its row. Raises JobNotFound."""
        job: Job = _answer(self._handle.cancel.remote(job_id))
        return job

    def result(self, job_id: UUID) -> bytes:
        """Return the bytes of the result. Raises ResultNotReady unless the job succeeded."""
        data: bytes = _answer(self._handle.result.remote(job_id))
        return data


def _answer(response: Any) -> Any:
    try:
        return response.result(timeout_s=ANSWER_TIMEOUT_S)
    except RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, RestorationError) else error) from None
    except (RayError, RayServeException, TimeoutError) as error:
        raise DependencyUnavailable(f"the service does not respond: {error}") from error


def connected_ingress(address: str) -> IngressHandle:
    """Return a handle to the service on the Ray cluster at `address`.

    An existing Ray connection of the process is reused. Raises DependencyUnavailable.
    """
    try:
        if not ray.is_initialized():
            # Ray's logs below ERROR would clutter the script's own output.
            ray.init(address=find_ray(address), log_to_driver=False, logging_level=logging.ERROR)
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
        return IngressHandle(serve.get_deployment_handle(INGRESS, app_name=APP))
    except (ConnectionError, RayServeException) as error:
        raise DependencyUnavailable(f"the service cannot be reached: {error}") from error
