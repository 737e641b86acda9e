"""What a batch script imports: many photos through Ray handles, without HTTP.

    with connect(owner="archive") as batch:
        photos = batch.submit_files(sorted(folder.glob("*.jpg")), workflow="restore")
        for result in batch.as_completed(photos):
            result.save(results / f"{photos[result.job.id].stem}.png")

The jobs are the same rows and objects as those submitted over HTTP. Whoever can reach the
cluster is trusted: the owner is whom the script says it is.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.cluster.handles import IngressHandle, connected_ingress
from actors.cluster.retry import patiently
from actors.status_actor import StatusActor, status_actor
from actors.submission.batches import Draft
from actors.submission.service import SubmissionRequest
from restoration.batches import JobBatch
from restoration.errors import InvalidRequest, JobNotFound
from restoration.events import JobEvent, from_json
from restoration.files import write_whole
from restoration.jobs import Failure, Job, OutputFormat, Priority
from restoration.reuse import Reuse

# The status actor answers as soon as a job ends. It may know nothing: rows are read this often.
POLL_S = 2.0
# Uploads on their way at a time: enough to hide the round trips, few enough for the ingress.
IN_FLIGHT = 8


@dataclass(frozen=True, slots=True)
class Result:
    """A job that has ended, and the way to its picture."""

    job: Job
    _ingress: IngressHandle

    def read(self) -> bytes:
        """The restored picture. Raises ResultNotReady unless the job succeeded."""
        return patiently(lambda: self._ingress.result(self.job.id))

    def save(self, path: Path) -> None:
        """Write the restored picture to `path`, which appears whole or not at all."""
        write_whole(path, self.read())


@dataclass(frozen=True, slots=True)
class AcceptedBatch:
    """A batch that is recorded: the file of each job, and why each of the others has none."""

    id: UUID
    jobs: Mapping[UUID, Path]
    refused: Sequence[tuple[Path, Failure]]


class Batch:
    """A script's connection to the service, under one owner. Made by `connect`."""

    def __init__(
        self, ingress: IngressHandle, status: ActorHandle[StatusActor], owner: str
    ) -> None:
        self._ingress = ingress
        self._status = status
        self._owner = owner

    def submit_files(
        self,
        paths: Iterable[Path],
        *,
        workflow: str = "restore",
        params: Mapping[str, object] | None = None,
        output_format: OutputFormat | None = None,
        priority: Priority = Priority.BATCH,
        webhook_url: str | None = None,
        reuse: Reuse = Reuse.ALLOW,
        on_refused: Callable[[Path, InvalidRequest], None] | None = None,
    ) -> dict[UUID, Path]:
        """Submit each file; returns the path of each job, in the order given.

        A file that the service refuses (no picture, too large, ...) goes to `on_refused`, and the
        others go on. Without it the first refusal is raised; the files before it, and a few after
        it, have been accepted and will run. While the queue is full this waits for room, however
        long that takes.
        """
        request = SubmissionRequest(
            owner=self._owner,
            image=b"",
            workflow=workflow,
            params=params or {},
            output_format=output_format,
            priority=priority,
            webhook_url=webhook_url,
            reuse=reuse,
        )
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            submissions = [(path, pool.submit(self._submit, request, path)) for path in paths]
            try:
                return dict(_accepted(submissions, on_refused))
            finally:
                pool.shutdown(cancel_futures=True)

    def _submit(self, request: SubmissionRequest, path: Path) -> Job:
        # sent again under the same key, a submission whose answer was lost counts once
        asked = replace(request, image=path.read_bytes(), idempotency_key=str(uuid.uuid4()))
        return patiently(lambda: self._ingress.submit(asked)).job

    def as_completed(self, job_ids: Iterable[UUID]) -> Iterator[Result]:
        """Each job as it ends, however it ends. Rows decide; the status actor makes it quick.

        Raises JobNotFound where there is no such job (any more), DependencyUnavailable when the
        service stays away.
        """
        open_ids = set(job_ids)
        self._demand(open_ids)
        while open_ids:
            ended = patiently(lambda: self._ingress.ended(list(open_ids)))
            for job in ended:
                open_ids.remove(job.id)
                yield Result(job, self._ingress)
            if open_ids and not ended:
                self._wait_for_any(open_ids)

    def _demand(self, job_ids: set[UUID]) -> None:
        unknown = job_ids.difference(patiently(lambda: self._ingress.known(list(job_ids))))
        if unknown:
            first = str(min(unknown))
            raise JobNotFound(f"of {len(unknown)} jobs there is no trace: {first}", job_id=first)

    def _wait_for_any(self, job_ids: set[UUID]) -> None:
        waiting: Any = self._status.wait.remote([str(job_id) for job_id in job_ids], POLL_S)
        try:
            ray.get(waiting, timeout=2 * POLL_S)
        except RayError:  # it restarts by itself, and rows are read meanwhile
            time.sleep(POLL_S)

    def progress(self, job_ids: Iterable[UUID]) -> dict[UUID, list[JobEvent]]:
        """How far jobs are: the newest event of each kind. Best effort, for a person to look at:
        without those of which nothing is known, and empty while the status actor is away."""
        asked: Any = self._status.latest.remote([str(job_id) for job_id in job_ids])
        try:
            told: dict[str, list[str]] = ray.get(asked, timeout=2 * POLL_S)
        except RayError:
            return {}
        return {UUID(job_id): [from_json(text) for text in texts] for job_id, texts in told.items()}

    def cancel(self, job_id: UUID) -> Job:
        """Ask for the end of a job; its row tells when it has ended."""
        return patiently(lambda: self._ingress.cancel(job_id))

    def submit_batch(
        self,
        paths: Iterable[Path],
        *,
        workflow: str = "restore",
        params: Mapping[str, object] | None = None,
        output_format: OutputFormat | None = None,
        priority: Priority = Priority.BATCH,
        reuse: Reuse = Reuse.ALLOW,
    ) -> AcceptedBatch:
        """Submit up to 1,000 files as one batch, which is there as a whole or not at all.

        A file that cannot be used does not sink the others. While the queue is full this waits
        for room, for six hours at most (BatchExpired). Raises InvalidRequest and its kin for what
        is wrong with all of them, BatchTooLarge, StorageFull, OSError; then nothing will run.
        """
        request = SubmissionRequest(
            owner=self._owner,
            image=b"",
            workflow=workflow,
            params=params or {},
            output_format=output_format,
            priority=priority,
            reuse=reuse,
        )
        patiently(lambda: self._ingress.check(request))
        draft = self._prepared(request, files := list(paths))
        new = draft.finish()
        patiently(lambda: self._ingress.record_batch(new, draft.jobs))
        jobs = {
            job.id: files[index] for job in draft.jobs if (index := job.batch_index) is not None
        }
        refused = [(files[each.index], each.reason) for each in new.refusals]
        return AcceptedBatch(new.id, jobs, refused)

    def _prepared(self, request: SubmissionRequest, files: Sequence[Path]) -> Draft:
        """A batch of all the files, each checked and stored; nothing is recorded."""
        draft = Draft(self._owner)
        places = [draft.add(path.name) for path in files]

        def prepare(path: Path, place: tuple[int, UUID]) -> None:
            index, job_id = place
            asked = replace(request, image=path.read_bytes())
            try:
                draft.accept(index, patiently(lambda: self._ingress.prepare(asked, job_id)))
            except InvalidRequest as error:
                draft.refuse(index, error)

        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            try:
                list(pool.map(prepare, files, places))
            finally:
                pool.shutdown(cancel_futures=True)
        return draft

    def batch_status(self, batch_id: UUID) -> JobBatch:
        """How the batch stands: `status` and `counts`. Raises BatchNotFound."""
        return patiently(lambda: self._ingress.batch(batch_id))

    def cancel_batch(self, batch_id: UUID) -> JobBatch:
        """Ask for the end of every job of the batch; its status tells when all have ended."""
        return patiently(lambda: self._ingress.cancel_batch(batch_id))


def _accepted(
    submissions: Iterable[tuple[Path, Future[Job]]],
    on_refused: Callable[[Path, InvalidRequest], None] | None,
) -> Iterator[tuple[UUID, Path]]:
    for path, submission in submissions:
        try:
            yield submission.result().id, path
        except InvalidRequest as refusal:
            if on_refused is None:
                raise
            on_refused(path, refusal)


@contextmanager
def connect(owner: str = "batch", address: str = "auto") -> Iterator[Batch]:
    """A Batch on the Ray cluster at `address`; a Ray connection of the caller's own is used.

    Raises DependencyUnavailable when there is no cluster, or the service does not run on it.
    """
    ours = not ray.is_initialized()
    try:
        yield Batch(connected_ingress(address), status_actor(), owner)
    finally:
        if ours:
            ray.shutdown()
