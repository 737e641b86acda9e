"""Jobs through the complete system: HTTP, Postgres, Ray, ComfyUI, S3 and back."""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from restoration.events import JobEvent, Progressed, StateChanged
from restoration.jobs import JobStatus, OutputFormat
from serve_app.client import ApiError, RestorationClient
from serve_app.schemas.restorations import Restoration
from tests.e2e.bare_comfyui import run_bare
from tests.support.photos import PhotoName, degrade, enlarge, original, ssim
from tests.support.stack import Stack
from tests.support.stack_processes import engines

pytestmark = pytest.mark.real_engine
API = "/api/v1/restorations"


@pytest.fixture
def client(stack: Stack) -> Iterator[RestorationClient]:
    with stack.client() as client:
        yield client


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def small() -> bytes:
    """Return a real photo that takes `enlarge` a fraction of a second."""
    return png(degrade(original("flower")).crop((0, 0, 64, 48)))


def test_a_photo_goes_in_and_its_restoration_comes_out(stack: Stack, small: bytes) -> None:
    """The submission answers 202 with the job and its location, events follow to the end, and the
    result matches the job."""
    with stack.http() as http:
        accepted = http.post(API, files={"image": ("a.png", small)}, data={"workflow": "enlarge"})
        assert accepted.status_code == 202, accepted.text
        job = Restoration.model_validate(accepted.json())
        assert accepted.headers["location"] == f"{API}/{job.id}"
        with stack.client() as client:
            events = list(client.events(job.id))
        assert events[-1] == StateChanged(JobStatus.SUCCEEDED, 1)
        ended = Restoration.model_validate(http.get(accepted.headers["location"]).json())
        redirect = http.get(job.links.result)
        assert redirect.status_code == 307
    assert ended.output is not None
    assert set(ended.timings_s) == {"fetch", "staged", "engine", "encode", "store"}
    result = httpx.get(redirect.headers["location"], trust_env=False)  # no token: it is signed
    assert result.headers["content-type"] == "image/png"
    assert len(result.content) == ended.output.size_bytes
    with Image.open(io.BytesIO(result.content)) as image:
        assert image.size == (256, 192)


def test_progress_rises_to_the_end(client: RestorationClient) -> None:
    """A watcher sees states in order and progress that never falls. The photo is so large that the
    job is not over before its first event."""
    job = client.submit(png(original("flower").resize((480, 320))), workflow="enlarge")
    events: list[JobEvent] = list(client.events(job.id))
    fractions = [event.fraction for event in events if isinstance(event, Progressed)]
    assert fractions
    assert fractions == sorted(fractions)
    states = [event.status for event in events if isinstance(event, StateChanged)]
    assert states[-1] is JobStatus.SUCCEEDED
    assert set(states) <= {JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.SUCCEEDED}


@pytest.mark.parametrize("name", ["flower", "china", "rocket"])
def test_restored_photos_are_closer_to_the_original_than_enlarged_ones(
    client: RestorationClient, name: PhotoName, tmp_path: Path
) -> None:
    """With default parameters the SSIM with the original is higher than that of bicubic
    enlargement."""
    truth = original(name)
    damaged = degrade(truth)
    job = client.wait(client.submit(png(damaged)).id)
    assert job.status is JobStatus.SUCCEEDED, job.failure
    client.download(job.id, tmp_path / "restored.png")
    with Image.open(tmp_path / "restored.png") as restored:
        assert restored.size == truth.size
        assert ssim(truth, restored) > ssim(truth, enlarge(damaged, truth.size))


@pytest.mark.parametrize("workflow", ["restore", "enlarge"])
def test_the_service_changes_no_pixel(
    stack: Stack, client: RestorationClient, small: bytes, workflow: str, tmp_path: Path
) -> None:
    """With strength 1 and PNG, the result equals that of the same graph in a bare ComfyUI."""
    params = {"strength": 1.0}
    job = client.wait(client.submit(small, workflow=workflow, params=params).id)
    client.download(job.id, tmp_path / "ours.png")
    bare = run_bare(stack.comfyui_url(), workflow, params, small)
    assert np.array_equal(pixels((tmp_path / "ours.png").read_bytes()), pixels(bare))


def pixels(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


@pytest.mark.parametrize("asked", OutputFormat)
def test_the_result_has_the_format_that_was_asked_for(
    client: RestorationClient, small: bytes, asked: OutputFormat, tmp_path: Path
) -> None:
    """The bytes, the content type and the job agree on the format."""
    out = tmp_path / "result"
    job = client.submit(small, workflow="enlarge", params={"quality": 80}, output_format=asked)
    client.wait(job.id)
    ended = client.download(job.id, out)
    assert ended.output is not None
    assert ended.output.content_type == f"image/{asked}"
    with Image.open(out) as image:
        assert image.format == asked.upper()


def test_two_jobs_on_two_workers_overlap(client: RestorationClient) -> None:
    """Each worker has its own ComfyUI, so that neither job waits for the other."""
    photo = png(degrade(original("flower")))
    first, second = [client.wait(id_) for id_ in [client.submit(photo).id, client.submit(photo).id]]
    assert started(first) < ended_at(second)
    assert started(second) < ended_at(first)


def test_three_jobs_on_two_workers_queue_and_finish(
    client: RestorationClient, small: bytes
) -> None:
    """Jobs beyond the number of workers wait, and each succeeds."""
    ids = [client.submit(small).id for _ in range(3)]
    jobs = [client.wait(id_) for id_ in ids]
    assert [(job.status, job.attempt) for job in jobs] == [(JobStatus.SUCCEEDED, 1)] * 3


def started(job: Restoration) -> datetime:
    assert job.started_at is not None
    return job.started_at


def ended_at(job: Restoration) -> datetime:
    assert job.finished_at is not None
    return job.finished_at


def test_a_waiting_client_gets_the_finished_job(stack: Stack, small: bytes) -> None:
    """`Prefer: wait` answers 200 with the ended job if it ends in time."""
    with stack.http() as http:
        answer = http.post(
            API,
            files={"image": ("a.png", small)},
            data={"workflow": "enlarge"},
            headers={"Prefer": "wait=50"},
        )
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=50"
    assert answer.json()["status"] == "succeeded"


@pytest.mark.results
def test_a_waiting_client_gets_the_picture_if_it_accepts_one(
    stack: Stack, client: RestorationClient, small: bytes, tmp_path: Path
) -> None:
    """One request through the proxy returns the same bytes as the job's result."""
    with stack.http() as http:
        answer = http.post(
            API,
            files={"image": ("a.png", small)},
            data={"workflow": "enlarge"},
            headers={"Prefer": "wait=50", "Accept": "image/*"},
        )
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    job_id = uuid.UUID(answer.headers["location"].rpartition("/")[2])
    client.download(job_id, tmp_path / "restored.png")
    assert answer.content == (tmp_path / "restored.png").read_bytes()


@pytest.mark.idempotency
def test_an_idempotency_key_makes_one_job(client: RestorationClient, small: bytes) -> None:
    """The same request with the same key returns the same job; another request is refused."""
    key = str(uuid.uuid4())
    first = client.submit(small, workflow="enlarge", idempotency_key=key)
    again = client.submit(small, workflow="enlarge", idempotency_key=key)
    assert again.id == first.id
    with pytest.raises(ApiError) as refused:
        client.submit(small, workflow="restore", idempotency_key=key)
    assert (refused.value.status, refused.value.code) == (409, "idempotency_conflict")


def test_somebody_elses_job_does_not_exist(stack: Stack, small: bytes) -> None:
    """Every route answers another owner with 404, as for a job that never existed."""
    with stack.client("owner") as owner:
        job = owner.submit(small, workflow="enlarge")
        owner.wait(job.id)
    with stack.http("stranger") as stranger:
        path = f"{API}/{job.id}"
        answers = [stranger.get(path + tail) for tail in ("", "/events", "/result")]
        answers.append(stranger.post(path + "/cancel"))
        assert [answer.status_code for answer in answers] == [404] * 4
        assert {answer.json()["code"] for answer in answers} == {"job_not_found"}
        assert stranger.get(API).json()["restorations"] == []


@pytest.mark.cancel
def test_a_waiting_job_is_cancelled_at_once(client: RestorationClient, small: bytes) -> None:
    """A job queued behind two running ones is cancelled without having started."""
    photo = png(degrade(original("flower")))
    busy = [client.submit(photo).id for _ in range(2)]
    waiting = client.submit(small)
    assert client.cancel(waiting.id).status is JobStatus.CANCELLED
    assert client.get(waiting.id).attempt == 0
    for job_id in busy:
        assert client.wait(job_id).status is JobStatus.SUCCEEDED


@pytest.mark.cancel
def test_a_running_job_is_cancelled(stack: Stack, client: RestorationClient) -> None:
    """Its engine is interrupted and free again; the job is cancelled and has no result."""
    job = client.submit(png(degrade(original("china"))))
    for event in client.events(job.id):
        if isinstance(event, Progressed) and "Upscale" in event.stage:
            break
    client.cancel(job.id)
    ended = client.wait(job.id)
    assert ended.status is JobStatus.CANCELLED
    for port in engines(stack.state_dir):
        queue = httpx.get(f"http://127.0.0.1:{port}/queue", trust_env=False).json()
        assert queue == {"queue_running": [], "queue_pending": []}
    with pytest.raises(ApiError, match="result_not_ready"):
        client.download(job.id, Path("never-written.png"))


def test_what_is_no_picture_never_becomes_a_job(stack: Stack) -> None:
    """The answer is a problem with a stable code and the request's id, and no job exists."""
    with stack.http("careless") as http:
        answer = http.post(API, files={"image": ("a.png", b"GIF89a rest")})
        assert answer.status_code == 415
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"] == "unsupported_image"
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        assert http.get(API).json()["restorations"] == []


def test_every_dependency_is_ready_by_name(stack: Stack) -> None:
    """/readyz names each dependency, needs no token, and contains nothing else."""
    answer = httpx.get(f"{stack.record.url}/readyz", trust_env=False)
    assert answer.json() == {
        "status": "ok",
        "dependencies": {"postgres": "ok", "s3": "ok", "redis": "ok", "issuer": "ok"},
    }
