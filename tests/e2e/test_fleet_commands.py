"""The operators' commands against a running stack, and their effect on the workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from comfy_pool.install.engine import COMFYUI_VERSION
from restoration.jobs import JobStatus
from serve_app.client import RestorationClient
from tests.support.photos import degrade, jpeg, original
from tests.support.polling import wait_until
from tests.support.stack import Stack
from tests.support.stack_processes import engines

pytestmark = pytest.mark.real_engine

TIMEOUT_S = 300


@pytest.fixture
def ids(stack: Stack) -> Iterator[list[str]]:
    """Yield the ids of the stack's two workers, which take jobs before and after the test."""
    wait_until(lambda: len(stack.workers()) == 2, timeout_s=TIMEOUT_S)
    found = [worker.id for worker in stack.workers().values()]
    yield found
    for worker in found:
        stack.restore("undrain", worker)
    wait_until(lambda: _engines_are(stack, "ready"), timeout_s=TIMEOUT_S)


def _status(stack: Stack) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(stack.restore("status", "--json").stdout)
    return shown


def _engines_are(stack: Stack, state: str) -> bool:
    workers = _status(stack)["workers"]["workers"]
    return all(each["engine"] == state for each in workers)


@pytest.mark.fleet
def test_a_drained_fleet_takes_no_job_until_it_is_undrained(stack: Stack, ids: list[str]) -> None:
    """The job waits, as `status` shows beside the drained workers, until one is undrained."""
    for worker in ids:
        stack.restore("drain", worker)
    shown = stack.restore("status", "--once").stdout
    assert shown.count("drained") == 2
    assert shown.count(f"ComfyUI {COMFYUI_VERSION}") == 2
    assert all(worker in shown for worker in ids)
    photo = jpeg(degrade(original("flower")).crop((0, 0, 64, 48)))
    with stack.client("local") as client:
        _wait_for_orders(stack)
        job = client.submit(photo, workflow="enlarge")
        waiting = {line["priority"]: line["waiting"] for line in _status(stack)["queue"]["lines"]}
        assert waiting["interactive"] == 1
        assert client.get(job.id).status is JobStatus.QUEUED
        stack.restore("undrain", ids[0])
        assert _ends(client, str(job.id)) is JobStatus.SUCCEEDED


def _wait_for_orders(stack: Stack) -> None:
    """Wait until each worker has reported again, and so has received its orders."""
    since = _status(stack)["workers"]["at"]
    wait_until(
        lambda: (
            sum(
                each["seen_at"] > since and each["drained"]
                for each in _status(stack)["workers"]["workers"]
            )
            == 2
        ),
        timeout_s=TIMEOUT_S,
    )


def _ends(client: RestorationClient, job_id: str) -> JobStatus:
    return client.wait(job_id).status


@pytest.mark.fleet
def test_an_engine_is_started_anew_on_request(stack: Stack, ids: list[str]) -> None:
    """A new process uses the same port, and the other worker's engine is not affected."""
    [port] = [port for port, worker in stack.workers().items() if worker.id == ids[0]]
    before = engines(stack.state_dir)
    stack.restore("restart-engine", ids[0])
    wait_until(
        lambda: engines(stack.state_dir).get(port) not in (None, before[port]),
        timeout_s=TIMEOUT_S,
    )
    assert [engines(stack.state_dir)[other] for other in before if other != port] == [
        process for other, process in before.items() if other != port
    ]


@pytest.mark.fleet
def test_an_unknown_worker_is_named(stack: Stack, ids: list[str]) -> None:
    """One line lists the workers, and the exit status is 1."""
    done = stack.restore("drain", "nobody", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no worker id starts with 'nobody'")
    assert all(worker in "".join(done.stderr.split()) for worker in ids)
