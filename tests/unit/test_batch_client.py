"""The guarantees of the batch client while the service fails or restarts."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from ray.exceptions import ActorUnavailableError

from actors import batch as module
from actors.batch import IN_FLIGHT, Batch, Result
from actors.cluster import retry
from actors.cluster.handles import IngressHandle
from actors.submission.requests import SubmissionRequest
from actors.submission.service import Submitted
from restoration.errors import (
    BrokenImage,
    DependencyUnavailable,
    JobNotFound,
    QueueFull,
    ResultNotReady,
)
from restoration.events import Progressed, to_json
from restoration.jobs import Job, JobOptions, JobStatus, OutputFormat, Priority
from tests.fakes.stores import utc_now
from tests.support.samples import artifact

DEADLINE_S = 300


class FakeIngress(IngressHandle):
    """The service behind its handle: the first `away` calls are refused."""

    def __init__(self) -> None:
        self.jobs: dict[UUID, Job] = {}
        self.requests: list[SubmissionRequest] = []
        self.away = 0
        self.full = 0  # so many submissions are refused as the queue is full
        self.unanswered = False  # the first submission is accepted, but its answer gets lost
        self.slow: set[bytes] = set()  # images accepted after all the others
        self.others_accepted = threading.Event()
        self.latency_s = 0.0
        self.to_end: list[list[UUID]] = []  # the jobs that end before each question
        self._lock = threading.Lock()

    def submit(self, request: SubmissionRequest) -> Submitted:
        time.sleep(self.latency_s)
        if request.image in self.slow:
            assert self.others_accepted.wait(DEADLINE_S)
        with self._lock:
            self.requests.append(request)
            self._answer()
            if self.full:
                self.full -= 1
                raise QueueFull("the service is full", retry_after_s=10)
            if request.image == b"broken":
                raise BrokenImage("the image cannot be decoded")
            job = self._earlier(request) or self._insert(request)
            if len(self.jobs) == IN_FLIGHT - len(self.slow):
                self.others_accepted.set()
            if self.unanswered:
                self.unanswered = False
                raise DependencyUnavailable("the service does not respond")
        return Submitted(job, replayed=False)

    def known(self, job_ids: Sequence[UUID]) -> Collection[UUID]:
        self._answer()
        return self.jobs.keys() & set(job_ids)

    def ended(self, job_ids: Sequence[UUID]) -> Sequence[Job]:
        self._answer()
        for job_id in self.to_end.pop(0) if self.to_end else ():
            self.jobs[job_id] = replace(self.jobs[job_id], status=JobStatus.SUCCEEDED)
        return [self.jobs[job_id] for job_id in job_ids if self.jobs[job_id].status.is_final]

    def cancel(self, job_id: UUID) -> Job:
        self._answer()
        return self.jobs[job_id]

    def result(self, job_id: UUID) -> bytes:
        self._answer()
        if self.jobs[job_id].status is not JobStatus.SUCCEEDED:
            raise ResultNotReady("the job failed")
        return b"restored"

    def _answer(self) -> None:
        if self.away:
            self.away -= 1
            raise DependencyUnavailable("the service does not respond")

    def _earlier(self, request: SubmissionRequest) -> Job | None:
        key = request.idempotency_key
        return next((job for job in self.jobs.values() if job.idempotency_key == key), None)

    def _insert(self, request: SubmissionRequest) -> Job:
        job = Job(
            id=uuid4(),
            owner=request.owner,
            status=JobStatus.QUEUED,
            workflow=request.workflow,
            workflow_version="1",
            params={},
            output_format=request.output_format or OutputFormat.PNG,
            options=request.options,
            input=artifact(),
            created_at=utc_now(),
            available_at=utc_now(),
            queue_deadline_at=utc_now(),
            idempotency_key=request.idempotency_key,
        )
        self.jobs[job.id] = job
        return job


class FakeStatus:
    """The status actor's handle: `wait.remote` and `latest.remote` record the jobs asked for."""

    def __init__(self) -> None:
        self.waited_for: list[set[str]] = []

    @property
    def wait(self) -> FakeStatus:
        return self

    latest = wait

    def remote(self, job_ids: Sequence[str], timeout_s: float = 0) -> None:
        self.waited_for.append(set(job_ids))


@pytest.fixture
def ingress(monkeypatch: pytest.MonkeyPatch) -> FakeIngress:
    monkeypatch.setattr(retry, "RETRY_S", 0.001)
    monkeypatch.setattr(module, "POLL_S", 0.001)
    monkeypatch.setattr("ray.get", lambda _, timeout: None)
    return FakeIngress()


@pytest.fixture
def status() -> FakeStatus:
    return FakeStatus()


@pytest.fixture
def batch(ingress: FakeIngress, status: FakeStatus) -> Batch:
    return Batch(ingress, cast("Any", status), owner="archive")


def _photos(folder: Path, *contents: bytes) -> list[Path]:
    paths = [folder / f"{i}.jpg" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


class TestSubmitFiles:
    def test_each_file_is_a_job_of_the_owner(
        self, batch: Batch, ingress: FakeIngress, tmp_path: Path
    ) -> None:
        """The request holds the file's bytes and the options; its class is batch."""
        photos = _photos(tmp_path, b"one")
        jobs = batch.submit_files(
            photos, workflow="enlarge", params={"scale": 2}, output_format=OutputFormat.WEBP
        )
        assert list(jobs.values()) == photos
        asked = ingress.requests[0]
        assert (asked.owner, asked.image, asked.workflow) == ("archive", b"one", "enlarge")
        assert (asked.params, asked.output_format) == ({"scale": 2}, OutputFormat.WEBP)
        assert asked.options.priority is Priority.BATCH

    def test_the_options_are_those_of_each_job(
        self, batch: Batch, ingress: FakeIngress, tmp_path: Path
    ) -> None:
        """A script has all options of a job, and replaces the default ones."""
        options = JobOptions(priority=Priority.INTERACTIVE, keep_metadata=True)
        batch.submit_files(_photos(tmp_path, b"one", b"two"), options=options)
        assert [request.options for request in ingress.requests] == [options, options]

    def test_the_order_is_the_callers(
        self, batch: Batch, ingress: FakeIngress, tmp_path: Path
    ) -> None:
        """Jobs come back in the order of the files, even if the first was accepted last."""
        photos = _photos(tmp_path, *(bytes([i]) for i in range(IN_FLIGHT)))
        ingress.slow = {bytes([0])}
        jobs = batch.submit_files(photos)
        assert list(jobs.values()) == photos
        assert [request.image for request in ingress.requests][-1] == bytes([0])

    def test_no_two_files_share_a_key(
        self, batch: Batch, ingress: FakeIngress, tmp_path: Path
    ) -> None:
        """The same picture twice is two jobs."""
        assert len(batch.submit_files(_photos(tmp_path, b"same", b"same"))) == 2

    def test_an_absent_service_is_asked_again(
        self, batch: Batch, ingress: FakeIngress, tmp_path: Path
    ) -> None:
        """A restart of the service only costs the script time."""
        ingress.away = 3
        assert len(batch.submit_files(_photos(tmp_path, b"one"))) == 1

    def test_a_lost_answer_makes_no_second_job(
        self, batch: Batch, ingress: FakeIngress, tmp_path: Path
    ) -> None:
        """A submission is repeated under the same key, so it counts once."""
        ingress.unanswered = True
        jobs = batch.submit_files(_photos(tmp_path, b"one"))
        assert list(jobs) == list(ingress.jobs)
        assert len(ingress.requests) == 2
        assert ingress.requests[0] == ingress.requests[1]

    @pytest.mark.admission
    def test_a_full_queue_is_waited_for(
        self, batch: Batch, ingress: FakeIngress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The script tries again with the same key until there is room."""
        monkeypatch.setattr(retry, "RETRY_AFTER_S", 0.001)
        monkeypatch.setattr(retry, "PATIENCE_S", 0)
        ingress.full = 3
        assert len(batch.submit_files(_photos(tmp_path, b"one"))) == 1
        assert len(ingress.requests) == 4
        assert len({request.idempotency_key for request in ingress.requests}) == 1

    def test_a_service_that_stays_away_is_told(
        self, batch: Batch, ingress: FakeIngress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After its patience the script gets an error and stops waiting."""
        monkeypatch.setattr(retry, "PATIENCE_S", 0.01)
        ingress.away = 1_000_000
        with pytest.raises(DependencyUnavailable):
            batch.submit_files(_photos(tmp_path, b"one"))

    def test_a_refused_file_stops_it(
        self, batch: Batch, ingress: FakeIngress, tmp_path: Path
    ) -> None:
        """The refusal is raised unchanged and not retried, and most later files are not sent."""
        ingress.latency_s = 0.2
        photos = _photos(tmp_path, b"broken", *[b"fine"] * 200)
        with pytest.raises(BrokenImage):
            batch.submit_files(photos)
        assert Counter(request.image for request in ingress.requests)[b"broken"] == 1
        assert len(ingress.requests) < len(photos)


class TestAsCompleted:
    def test_each_job_comes_once(
        self, batch: Batch, ingress: FakeIngress, status: FakeStatus, tmp_path: Path
    ) -> None:
        """Jobs come in the order of their ends; between queries the client waits for open ones."""
        jobs = list(batch.submit_files(_photos(tmp_path, b"0", b"1", b"2")))
        ingress.to_end = [[], [jobs[2]], [], [jobs[0], jobs[1]]]
        results = [result.job.id for result in batch.as_completed([*jobs, jobs[0]])]
        assert results[0] == jobs[2]
        assert sorted(results) == sorted(jobs)
        assert status.waited_for == [set(map(str, jobs)), {str(jobs[0]), str(jobs[1])}]

    def test_no_jobs_are_no_results(self, batch: Batch, status: FakeStatus) -> None:
        assert list(batch.as_completed([])) == []
        assert not status.waited_for

    def test_a_job_that_is_not_there_is_not_waited_for(self, batch: Batch, tmp_path: Path) -> None:
        """A job never submitted, or whose row was deleted long ago, would never end."""
        jobs = list(batch.submit_files(_photos(tmp_path, b"0")))
        stranger = uuid4()
        with pytest.raises(JobNotFound, match=str(stranger)):
            next(batch.as_completed([*jobs, stranger]))

    def test_it_goes_on_without_the_status_actor(
        self, batch: Batch, ingress: FakeIngress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The rows decide; the actor only makes it faster."""

        def get(_: object, timeout: float) -> None:
            raise ActorUnavailableError("for a moment", None)

        monkeypatch.setattr("ray.get", get)
        jobs = list(batch.submit_files(_photos(tmp_path, b"0")))
        ingress.to_end = [[], [], jobs]
        assert [result.job.id for result in batch.as_completed(jobs)] == jobs

    def test_it_goes_on_when_the_service_is_back(
        self, batch: Batch, ingress: FakeIngress, tmp_path: Path
    ) -> None:
        """A restart of the service does not end a running batch."""
        jobs = list(batch.submit_files(_photos(tmp_path, b"0", b"1")))
        ingress.to_end = [[jobs[0]], [jobs[1]]]
        results = batch.as_completed(jobs)
        assert next(results).job.id == jobs[0]
        ingress.away = 3
        assert [result.job.id for result in results] == [jobs[1]]


class TestProgress:
    def test_it_is_what_the_status_actor_has(
        self, batch: Batch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The answer holds, for each known job, the newest event of each kind."""
        job_id, event = uuid4(), Progressed(0.5, "sampling", 1)
        monkeypatch.setattr("ray.get", lambda _, timeout: {str(job_id): [to_json(event)]})
        assert batch.progress([job_id, uuid4()]) == {job_id: [event]}

    def test_it_is_empty_without_the_status_actor(
        self, batch: Batch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A script does not fail because progress is unavailable."""

        def get(_: object, timeout: float) -> None:
            raise ActorUnavailableError("for a moment", None)

        monkeypatch.setattr("ray.get", get)
        assert batch.progress([uuid4()]) == {}


class TestPatience:
    def test_a_call_that_hung_for_longer_than_patience_is_made_again(
        self, batch: Batch, ingress: FakeIngress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Patience counts from the first failure, not from the start of the call."""
        monkeypatch.setattr(retry, "PATIENCE_S", 1.0)
        ingress.latency_s, ingress.away = 1.2, 1
        assert len(batch.submit_files(_photos(tmp_path, b"one"))) == 1

    def test_a_cancel_outlives_a_restart_too(
        self, batch: Batch, ingress: FakeIngress, tmp_path: Path
    ) -> None:
        """A cancel may be repeated like every other call."""
        (job_id,) = batch.submit_files(_photos(tmp_path, b"one"))
        ingress.away = 3
        assert batch.cancel(job_id).id == job_id


class TestSave:
    @pytest.fixture
    def result(self, batch: Batch, ingress: FakeIngress, tmp_path: Path) -> Result:
        jobs = list(batch.submit_files(_photos(tmp_path, b"0")))
        ingress.to_end = [jobs]
        return next(batch.as_completed(jobs))

    def test_the_file_is_the_result(self, result: Result, tmp_path: Path) -> None:
        """The file holds the object's bytes and replaces the old file, with no file beside it."""
        (folder := tmp_path / "results").mkdir()
        (folder / "0.png").write_bytes(b"older")
        result.save(folder / "0.png")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"0.png": b"restored"}

    def test_it_appears_whole_or_not_at_all(
        self, result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When the disk is full, the old file stays and no partial file is left."""
        (folder := tmp_path / "results").mkdir()
        (folder / "0.png").write_bytes(b"older")

        def write_half(path: Path, data: bytes) -> int:
            with path.open("wb") as file:
                file.write(data[:4])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(OSError, match="No space"):
            result.save(folder / "0.png")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"0.png": b"older"}

    def test_a_job_without_a_result_writes_nothing(
        self, result: Result, ingress: FakeIngress, tmp_path: Path
    ) -> None:
        """The reason is raised, and no empty file is written."""
        ingress.jobs[result.job.id] = replace(result.job, status=JobStatus.FAILED)
        with pytest.raises(ResultNotReady):
            result.save(tmp_path / "result.png")
        assert not list(tmp_path.glob("*.png"))
