"""Jobs survive killed processes, and a stack leaves no process behind.

The tests at the end share a second stack, attached to a ComfyUI of the first, and run in order.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import httpx
import pytest

from persistence.embedded import seaweed
from persistence.objects.keys import output_key
from restoration.jobs import AttemptOutcome, AttemptRef, JobStatus, OutputFormat
from serve_app.local.record import find_report, report_path
from serve_app.schemas.restorations import Restoration
from tests.support.photos import jpeg, original
from tests.support.polling import DEADLINE_S, wait_until
from tests.support.stack import LEASE_S, Stack, Terminal, running_in_terminal
from tests.support.stack_processes import Process, engines, of_stack, workers

pytestmark = pytest.mark.real_engine


@pytest.fixture(scope="module")
def photo() -> bytes:
    """Return a photo that takes `restore` some seconds, long enough to kill a process meanwhile."""
    return jpeg(original("flower").resize((240, 160)))


def serving_ports(stack: Stack) -> list[int]:
    """Return the ports whose ComfyUI answers and whose worker has reported. Such an engine executes
    only jobs, not a warm-up."""
    ports = workers(stack.state_dir).keys() & stack.workers().keys()
    return [port for port in ports if answers(f"http://127.0.0.1:{port}")]


def answers(comfyui_url: str) -> bool:
    return queue_of(comfyui_url) is not None


def queue_of(comfyui_url: str) -> dict[str, list[object]] | None:
    """Return ComfyUI's queue, or None if it cannot be reached."""
    try:
        answer = httpx.get(f"{comfyui_url}/queue", trust_env=False, timeout=10)
    except httpx.TransportError:
        return None
    queue: dict[str, list[object]] = answer.raise_for_status().json()
    return queue


@dataclass
class Losses:
    """A worker and the engine of another worker, both killed at work, and what came of their jobs.
    The processes are those from before."""

    workers: dict[int, Process]
    engines: dict[int, Process]
    worker_port: int
    engine_port: int
    killed_at: datetime
    jobs: list[Restoration]

    def job(self, of_killed_worker: bool) -> Restoration:
        [job] = [j for j in self.jobs if (j.attempts[0].code == "worker_lost") is of_killed_worker]
        return job


@pytest.fixture(scope="module")
def losses(stack: Stack, photo: bytes) -> Losses:
    """Kill a worker and the engine of the other, and wait until both serve again."""
    wait_until(lambda: len(serving_ports(stack)) == 2)
    with stack.client() as client:
        jobs = [client.submit(photo).id for _ in range(2)]
        before = workers(stack.state_dir), engines(stack.state_dir)
        worker_port, engine_port = before[0]
        wait_until(lambda: is_at_work(worker_port) and is_at_work(engine_port))
        killed_at = datetime.now(UTC)
        before[0][worker_port].kill()
        before[1][engine_port].kill()
        ended = [client.wait(job) for job in jobs]
    wait_until(lambda: len(serving_ports(stack)) == 2)
    return Losses(*before, worker_port, engine_port, killed_at, ended)


def assert_ran_again(stack: Stack, job: Restoration, out: Path) -> None:
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2), job.failure
    with stack.client() as client:
        client.download(job.id, out)


def is_at_work(port: int) -> bool:
    """Return whether the port's ComfyUI executes a prompt."""
    queue = queue_of(f"http://127.0.0.1:{port}")
    return queue is not None and bool(queue["queue_running"])


@pytest.mark.lease
def test_a_killed_worker_takes_its_engine_along_and_its_job_runs_again(
    stack: Stack, losses: Losses, tmp_path: Path
) -> None:
    """When the replica is killed, its ComfyUI ends, and another attempt stores the only result. The
    job is queued again long before its lease lapses."""
    assert not losses.engines[losses.worker_port].is_alive()
    job = losses.job(of_killed_worker=True)
    assert_ran_again(stack, job, tmp_path / "restored.png")
    assert job.attempts[0].ended_at - losses.killed_at < timedelta(seconds=LEASE_S / 3)
    assert stored_results(stack, job) == [output_key(AttemptRef(job.id, 2), OutputFormat.PNG)]


@pytest.mark.engine_health
def test_a_killed_engine_is_started_again_and_its_job_runs_again(
    stack: Stack, losses: Losses, tmp_path: Path
) -> None:
    """When ComfyUI is killed, its job is handed back at once, and the worker starts a new
    engine."""
    assert_ran_again(stack, losses.job(of_killed_worker=False), tmp_path / "restored.png")
    worker = losses.workers[losses.engine_port]
    assert workers(stack.state_dir)[losses.engine_port] == worker


def stored_results(stack: Stack, job: Restoration) -> list[str]:
    """Return the keys of the job's results in S3 from all attempts."""
    state = json.loads((stack.state_dir / "state.json").read_bytes())
    s3 = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{state['ports']['s3']}",
        region_name=seaweed.REGION,
        aws_access_key_id=state["secrets"]["s3-access-key"],
        aws_secret_access_key=state["secrets"]["s3-secret-key"],
    )
    with closing(s3):
        listing = s3.list_objects_v2(Bucket=seaweed.BUCKET, Prefix=f"outputs/{job.id}/")
    return [item["Key"] for item in listing["Contents"]]


@pytest.fixture(scope="module")
def terminal(stack: Stack) -> Iterator[Terminal]:
    """Run a second stack on a ComfyUI of the first, so that it starts quickly without engines. Its
    first `restore up` runs in the foreground, later ones do not."""
    environ = {"COMFYUI_URL": stack.comfyui_url(), "DRAIN_S": "4", "IMAGE_PROCESSES": "1"}
    with running_in_terminal(environ) as terminal:
        yield terminal


@pytest.fixture(scope="module")
def attached(terminal: Terminal) -> Stack:
    return terminal.stack


def test_an_attached_stack_works_with_somebody_elses_comfyui(
    attached: Stack, photo: bytes, tmp_path: Path
) -> None:
    """With COMFYUI_URL set, a job succeeds and no engine is started."""
    with attached.client() as client:
        job = client.wait(client.submit(photo, workflow="enlarge").id)
        assert job.status is JobStatus.SUCCEEDED, job.failure
        client.download(job.id, tmp_path / "restored.png")
    assert engines(attached.state_dir) == {}


@pytest.mark.parametrize("how", [[], ["--detach"]])
def test_a_second_stack_on_one_folder_is_refused(attached: Stack, how: list[str]) -> None:
    """One line names the running stack, which keeps serving."""
    refused = attached.restore("up", *how, check=False)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert f"pid {attached.record.pid}" in refused.stderr
    with attached.http() as http:
        assert http.get("/readyz").is_success


@pytest.mark.parametrize(
    ("program", "part"), [("raylet", "raylet"), ("gcs_server", "control plane (GCS)")]
)
def test_a_stack_that_loses_its_ray_says_so_and_goes_on_with_its_jobs(
    terminal: Terminal, attached: Stack, photo: bytes, program: str, part: str
) -> None:
    """`restore up` names the lost part and starts Ray again. Meanwhile no request hangs. Afterwards
    the running and waiting jobs end, and nothing of the old Ray is left."""
    up_pid, url = attached.record.pid, attached.record.url
    with attached.client() as client:
        jobs = [client.submit(photo).id]
        jobs += [client.submit(photo, workflow="enlarge").id for _ in range(2)]
        wait_until(lambda: client.get(jobs[0]).status is not JobStatus.QUEUED)
    before = [each for each in of_stack(attached.state_dir, up_pid) if is_of_ray(each)]
    [victim] = [each for each in before if Path(each.words[0]).name == program]
    victim.kill()
    wait_until(lambda: "Ray was lost: its " + part in terminal.says())
    wait_until(lambda: is_ready(url))
    assert [each for each in before if each.is_alive()] == []
    assert attached.record.pid == up_pid
    with attached.client() as client:
        assert {client.wait(job).status for job in jobs} == {JobStatus.SUCCEEDED}


def is_of_ray(process: Process) -> bool:
    return process.command.startswith("ray::") or "/site-packages/ray/" in process.command


def is_ready(url: str) -> bool:
    """Return whether the service is ready. Fails the test if a connection is accepted but not
    answered."""
    try:
        return httpx.get(f"{url}/readyz", trust_env=False, timeout=DEADLINE_S).is_success
    except httpx.TimeoutException:
        raise
    except httpx.TransportError:
        return False


@pytest.mark.drain
def test_ctrl_c_stops_all_that_restore_up_started_and_loses_no_job(
    terminal: Terminal, attached: Stack, photo: bytes
) -> None:
    """A terminal sends SIGINT to every process of the group, including Ray's, and the stop is still
    orderly. `restore up` reports it and exits with 0, nothing is left, and the running job succeeds
    after the next `restore up` without a charged attempt."""
    port = attached.record.url.rpartition(":")[2]
    with attached.client() as client:
        job = client.submit(photo)
        wait_until(lambda: client.get(job.id).status is not JobStatus.QUEUED)
    processes = of_stack(attached.state_dir, attached.record.pid)
    assert len(processes) > 10
    assert terminal.press_ctrl_c() == 0
    assert left_of(attached, processes) == []
    assert terminal.says().endswith("stopped\n")
    assert "Traceback" not in terminal.says()
    attached.restore("up", "--detach", "--port", port)
    with attached.client() as client:
        ended = client.wait(job.id)
    assert ended.status is JobStatus.SUCCEEDED, ended.failure
    outcomes = {attempt.outcome for attempt in ended.attempts}
    assert outcomes <= {AttemptOutcome.HANDED_BACK, AttemptOutcome.SUCCEEDED}


@pytest.mark.drain
def test_a_stack_that_is_stopped_at_work_goes_on_with_it_later(
    stack: Stack, attached: Stack, photo: bytes
) -> None:
    """An orderly stop leaves only the ComfyUI that belongs to the other stack. A job that did not
    end in time is handed back without a charge; after `restore up` on the same folder all jobs
    end."""
    up_pid, port = attached.record.pid, attached.record.url.rpartition(":")[2]
    with attached.client() as client:
        # Takes several times the grace period in one step that cannot be interrupted. The engine is
        # not the stack's own, and keeps executing it for that time.
        long_job = client.submit(jpeg(original("flower").resize((300, 200))))
        jobs = [client.submit(photo, workflow="enlarge") for _ in range(2)]
        wait_until(lambda: client.get(long_job.id).status is not JobStatus.QUEUED)
    processes = of_stack(attached.state_dir, up_pid)
    os.kill(up_pid, signal.SIGTERM)  # `restore down` would kill it on a slow machine
    wait_until(lambda: left_of(attached, processes) == [])
    assert answers(stack.comfyui_url())
    attached.restore("up", "--detach", "--port", port)
    with attached.client() as client:
        [first, *_] = client.get(long_job.id).attempts
        assert first.outcome is AttemptOutcome.HANDED_BACK
        client.cancel(long_job.id)
        assert client.wait(long_job.id).status is JobStatus.CANCELLED
        assert {client.wait(job.id).status for job in jobs} == {JobStatus.SUCCEEDED}


@pytest.mark.durability
def test_a_stack_that_is_killed_leaves_nothing_but_its_jobs(
    stack: Stack, attached: Stack, photo: bytes
) -> None:
    """After SIGKILL of a busy `restore up`, databases, Ray and workers end by themselves. `restore
    down` ends a stack that is only starting. The next `restore up` continues the job."""
    up_pid, port = attached.record.pid, attached.record.url.rpartition(":")[2]
    with attached.client() as client:
        job = client.submit(photo)
        wait_until(lambda: client.get(job.id).status is not JobStatus.QUEUED)
    processes = of_stack(attached.state_dir, up_pid)
    assert len(processes) > 10
    os.kill(up_pid, signal.SIGKILL)
    wait_until(lambda: left_of(attached, processes) == [])

    report_path(attached.state_dir).unlink()
    up = attached.begin_up(port)
    wait_until(lambda: find_report(attached.state_dir) or up.poll() is not None)
    processes = of_stack(attached.state_dir, up.pid)
    attached.restore("down")
    assert up.wait() != 0
    assert left_of(attached, processes) == []

    assert answers(stack.comfyui_url())
    attached.restore("up", "--detach", "--port", port)
    with attached.client() as client:
        assert client.wait(job.id).status is JobStatus.SUCCEEDED


def test_a_stack_whose_processes_are_all_suspended_is_ended(
    stack: Stack, attached: Stack, photo: bytes
) -> None:
    """`restore down` leaves none of its processes, and after `restore up` the job succeeds."""
    port = attached.record.url.rpartition(":")[2]
    with attached.client() as client:
        job = client.submit(photo)
        wait_until(lambda: client.get(job.id).status is not JobStatus.QUEUED)
    processes = of_stack(attached.state_dir, attached.record.pid)
    for process in processes:
        with suppress(ProcessLookupError):  # a connection's process may have ended
            os.kill(process.pid, signal.SIGSTOP)
    attached.restore("down")
    assert left_of(attached, processes) == []
    assert answers(stack.comfyui_url())
    attached.restore("up", "--detach", "--port", port)
    with attached.client() as client:
        assert client.wait(job.id).status is JobStatus.SUCCEEDED


def left_of(stack: Stack, processes: list[Process]) -> list[Process]:
    alive = {process for process in processes if process.is_alive()}
    return list(alive.union(of_stack(stack.state_dir)))
