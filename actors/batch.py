"""The API for batch scripts: submit many photos through Ray handles, without HTTP.

    with connect(owner="archive") as batch:
        photos = batch.submit_files(sorted(folder.glob("*.jpg")), workflow="restore")
        for result in batch.as_completed(photos):
            result.save(results / f"{photos[result.job.id].stem}.png")

The jobs are the same rows and objects as those submitted over HTTP. Any script that can reach the
cluster is trusted: it names the owner itself, and no token is checked.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from actors.submission.batches import Draft, DraftPhoto
from actors.submission.requests import SubmissionRequest
from restoration.batches import JobBatch
from restoration.errors import InvalidRequest, JobNotFound
from restoration.events import JobEvent, from_json
from restoration.files import write_whole
from restoration.jobs import Failure, Job, JobOptions, OutputFormat, Priority
from restoration.reuse import Reuse

# The status actor returns as soon as a job ends, but it may miss one, so the rows are polled too.
POLL_S = 2.0
# Concurrent uploads: enough to hide the round trips, few enough not to overload the ingress.
IN_FLIGHT = 8
BATCH_OPTIONS = JobOptions(priority=Priority.BATCH)


@dataclass(frozen=True, slots=True)
class Result:
    """A finished job whose picture can be read."""

    job: Job
    _ingress: IngressHandle

    def read(self) -> bytes:
        """Return the bytes of the restored picture.

        Raises ResultNotReady unless the job succeeded, DependencyUnavailable after a minute without
        an answer.
        """
        return patiently(lambda: self._ingress.result(self.job.id))

    def save(self, path: Path) -> None:
        """Write the restored picture to `path` atomically. Raises as `read`, and OSError."""
        write_whole(path, self.read())


@dataclass(frozen=True, slots=True)
class AcceptedBatch:
    """A recorded batch: the file of each job, and each refused file with its reason."""

    id: UUID
    jobs: Mapping[UUID, Path]
    refused: Sequence[tuple[Path, Failure]]


class Batch:
    """A script's connection to the service on behalf of one owner. Create it with `connect`."""

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
        options: JobOptions = BATCH_OPTIONS,
        reuse: Reuse = Reuse.ALLOW,
        on_refused: Callable[[Path, InvalidRequest], None] | None = None,
    ) -> dict[UUID, Path]:
        """Submit each file as a job, and return the path of each job in the order given.

        A refused file (not a picture, too large, ...) is passed to `on_refused`, and the others
        continue. Without `on_refused` the first refusal is raised; the files before it, and a few
        after it, have been accepted and will run. While the queue is full this waits without
        limit. Raises DependencyUnavailable after a minute without an answer, and OSError.
        """
        request = SubmissionRequest(
            owner=self._owner,
            image=b"",
            workflow=workflow,
            params=params or {},
            output_format=output_format,
            options=options,
            reuse=reuse,
        )

        def submit(path: Path) -> Job:
            # The idempotency key makes a retry after a lost response create no second job.
            asked = replace(request, image=path.read_bytes(), idempotency_key=str(uuid.uuid4()))
            return patiently(lambda: self._ingress.submit(asked)).job

        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            submissions = [(path, pool.submit(submit, path)) for path in paths]
            accepted = {}
            try:
                for path, submission in submissions:
                    try:
                        accepted[submission.result().id] = path
                    except InvalidRequest as refusal:
                        if on_refused is None:
                            raise
                        on_refused(path, refusal)
            finally:
                pool.shutdown(cancel_futures=True)
        return accepted

    def as_completed(self, job_ids: Iterable[UUID]) -> Iterator[Result]:
        """Yield each job when it ends, with any final status.

        The rows are authoritative; the status actor only shortens the wait. Raises JobNotFound for
        a job that does not exist or was removed, DependencyUnavailable after a minute without an
        answer.
        """
        open_ids = set(job_ids)
        unknown = open_ids.difference(patiently(lambda: self._ingress.known(list(open_ids))))
        if unknown:
            first = str(min(unknown))
            raise JobNotFound(
                f"{len(unknown)} of the jobs do not exist, {first} among them", job_id=first
            )
        while open_ids:
            ended = patiently(lambda: self._ingress.ended(list(open_ids)))
            for job in ended:
                open_ids.remove(job.id)
                yield Result(job, self._ingress)
            if open_ids and not ended:
                names = [str(job_id) for job_id in open_ids]
                waiting: Any = self._status.wait.remote(names, POLL_S)
                try:
                    ray.get(waiting, timeout=2 * POLL_S)
                except RayError:  # Ray restarts the actor; polling the rows continues meanwhile
                    time.sleep(POLL_S)

    def progress(self, job_ids: Iterable[UUID]) -> dict[UUID, list[JobEvent]]:
        """Return the newest event of each type, by job.

        Best effort, for display: jobs without recorded events are left out, and the result is empty
        while the status actor is unavailable.
        """
        asked: Any = self._status.latest.remote([str(job_id) for job_id in job_ids])
        try:
            events: dict[str, list[str]] = ray.get(asked, timeout=2 * POLL_S)
        except RayError:
            return {}
        return {
            UUID(job_id): [from_json(text) for text in texts] for job_id, texts in events.items()
        }

    def cancel(self, job_id: UUID) -> Job:
        """Request the cancellation of a job, and return its row.

        A job that was running is cancelled later: its status says when.
        """
        return patiently(lambda: self._ingress.cancel(job_id))

    def submit_batch(
        self,
        paths: Iterable[Path],
        *,
        workflow: str = "restore",
        params: Mapping[str, object] | None = None,
        output_format: OutputFormat | None = None,
        options: JobOptions = BATCH_OPTIONS,
        reuse: Reuse = Reuse.ALLOW,
    ) -> AcceptedBatch:
        """Submit up to 1,000 files as one batch, recorded in one transaction.

        Files that cannot be used are listed in `refused`; the others are accepted. While the queue
        is full this waits, for six hours at most (BatchExpired). Raises InvalidRequest or a
        subclass if the request is wrong for every file, BatchTooLarge, StorageFull,
        DependencyUnavailable, OSError. After an InvalidRequest, BatchTooLarge, StorageFull or
        OSError nothing is recorded.
        """
        request = SubmissionRequest(
            owner=self._owner,
            image=b"",
            workflow=workflow,
            params=params or {},
            output_format=output_format,
            options=options,
            reuse=reuse,
        )
        patiently(lambda: self._ingress.check(request))
        files = list(paths)
        draft = Draft(self._owner)
        photos = [draft.add(path.name) for path in files]

        def prepare(path: Path, photo: DraftPhoto) -> None:
            asked = replace(request, image=path.read_bytes())
            try:
                photo.job = patiently(lambda: self._ingress.prepare(asked, photo.job_id))
            except InvalidRequest as error:
                photo.refuse(error)

        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            try:
                list(pool.map(prepare, files, photos))
            finally:
                pool.shutdown(cancel_futures=True)
        new, jobs = draft.finish()
        patiently(lambda: self._ingress.record_batch(new, jobs))
        return AcceptedBatch(
            id=new.id,
            jobs={photo.job_id: files[photo.index] for photo in photos if photo.job},
            refused=[(files[each.index], each.reason) for each in new.refusals],
        )

    def batch_status(self, batch_id: UUID) -> JobBatch:
        """Return the batch with its `status` and `counts`. Raises BatchNotFound."""
        return patiently(lambda: self._ingress.batch(batch_id))

    def cancel_batch(self, batch_id: UUID) -> JobBatch:
        """Request the cancellation of every job of the batch; its status says when all ended."""
        return patiently(lambda: self._ingress.cancel_batch(batch_id))


@contextmanager
def connect(owner: str = "batch", address: str = "auto") -> Iterator[Batch]:
    """Connect to the service on the Ray cluster at `address`.

    An existing Ray connection of the process is reused and left open. Raises DependencyUnavailable
    if there is no cluster, or the service does not run on it.
    """
    ours = not ray.is_initialized()
    try:
        yield Batch(connected_ingress(address), status_actor(), owner)
    finally:
        if ours:
            ray.shutdown()
