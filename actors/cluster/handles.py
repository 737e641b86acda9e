"""Typed handles, each made once: every Serve handle starts a metrics pusher and a long poll."""

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
from actors.submission.service import SubmissionRequest, Submitted
from restoration.batches import JobBatch, NewBatch
from restoration.errors import DependencyUnavailable, RestorationError
from restoration.jobs import AttemptRef, Job, NewJob

APP = "comfy-restore"
INGRESS = "Ingress"
WORKERS = "GpuWorker"
CONTROLLER_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 120.0  # without a replica Serve waits for one, and says nothing


class WorkerPool:
    """The GPU workers, as the dispatcher sees them."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def process(self, ref: AttemptRef, hold_s: float) -> str:
        """Send a ticket; returns what came of it, BUSY if its worker had no use for it.

        Raises errors of Ray's own and of Serve's: ActorDiedError says in `actor_id` which worker
        died.
        """
        outcome: str = await self._handle.process.remote(str(ref.job_id), ref.attempt, hold_s)
        return outcome


class ServePool:
    """How many GPU workers Serve is to keep (`actors.leader.autoscaler.Pool`).

    Serve's public way to set it is HTTP to Ray's dashboard, which not every cluster runs; this
    asks the controller as that does, one more reason why no other version of Ray is allowed.
    """

    async def size(self) -> int:
        with _unavailable():  # the deployment is not there while the application is built anew
            details = await _of_controller("get_serve_instance_details")
            size: int = details["applications"][APP]["deployments"][WORKERS]["target_num_replicas"]
            return size

    async def resize(self, workers: int) -> None:
        with _unavailable():
            await _of_controller("update_deployment_replicas", DeploymentID(WORKERS, APP), workers)


async def _of_controller(method: str, *args: object) -> Any:
    async with asyncio.timeout(CONTROLLER_TIMEOUT_S):
        # on a thread: it asks Ray's control plane, and waits up to a minute for an answer
        controller = await asyncio.to_thread(ray.get_actor, SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
        return await getattr(controller, method).remote(*args)


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (RayError, RayServeException, LookupError, ValueError, TimeoutError) as error:
        raise DependencyUnavailable(f"Serve's controller: {error!r}") from error


class IngressHandle:
    """The ingress without HTTP, for a script's own threads; calls wait for the answer.

    They raise the error of `restoration.errors` that was raised over there, or
    DependencyUnavailable if nobody answers.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    def submit(self, request: SubmissionRequest) -> Submitted:
        submitted: Submitted = _answer(self._handle.submit.remote(request))
        return submitted

    def check(self, request: SubmissionRequest) -> None:
        """Raises InvalidRequest and its kin for what is wrong whatever the picture."""
        _answer(self._handle.check.remote(request))

    def prepare(self, request: SubmissionRequest, job_id: UUID) -> NewJob:
        """A job whose picture is checked and stored, for `record_batch`; nothing is recorded."""
        job: NewJob = _answer(self._handle.prepare.remote(request, job_id))
        return job

    def record_batch(self, new: NewBatch, jobs: Sequence[NewJob]) -> JobBatch:
        """Record the batch and all its jobs; it may be called again."""
        submitted: SubmittedBatch = _answer(self._handle.record_batch.remote(new, jobs))
        return submitted.batch

    def batch(self, batch_id: UUID) -> JobBatch:
        batch: JobBatch = _answer(self._handle.batch.remote(batch_id))
        return batch

    def cancel_batch(self, batch_id: UUID) -> JobBatch:
        batch: JobBatch = _answer(self._handle.cancel_batch.remote(batch_id))
        return batch

    def known(self, job_ids: Sequence[UUID]) -> Collection[UUID]:
        """Those of the jobs that there are."""
        known: Collection[UUID] = _answer(self._handle.known.remote(job_ids))
        return known

    def ended(self, job_ids: Sequence[UUID]) -> Sequence[Job]:
        """Those of the jobs that have ended, as their rows say."""
        jobs: Sequence[Job] = _answer(self._handle.ended.remote(job_ids))
        return jobs

    def cancel(self, job_id: UUID) -> Job:
        job: Job = _answer(self._handle.cancel.remote(job_id))
        return job

    def result(self, job_id: UUID) -> bytes:
        data: bytes = _answer(self._handle.result.remote(job_id))
        return data


def _answer(response: Any) -> Any:
    try:
        return response.result(timeout_s=ANSWER_TIMEOUT_S)
    except RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, RestorationError) else error) from None
    except (RayError, RayServeException, TimeoutError) as error:
        raise DependencyUnavailable(f"the service does not answer: {error}") from error


def connected_ingress(address: str) -> IngressHandle:
    """The service on the Ray cluster at `address`; a Ray connection that there is already is used.
    Raises DependencyUnavailable."""
    try:
        if not ray.is_initialized():
            # a script's output is its own: no word of Ray's but errors
            ray.init(address=find_ray(address), log_to_driver=False, logging_level=logging.ERROR)
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
        return IngressHandle(serve.get_deployment_handle(INGRESS, app_name=APP))
    except (ConnectionError, RayServeException) as error:
        raise DependencyUnavailable(f"the service cannot be reached: {error}") from error
