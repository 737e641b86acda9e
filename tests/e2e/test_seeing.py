"""Traces, usage and metrics of the complete stack after a job."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from datetime import timedelta

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from restoration.observability.metrics import METRICS, PREFIX, Kind
from serve_app.client import ApiError
from tests.fakes.collector import Collector
from tests.fakes.receiver import Receiver, receiving
from tests.fakes.site import photo
from tests.support.polling import until
from tests.support.stack import Stack

DEADLINE_S = 300
# Ends are counted within 15 s and Ray reports every 10 s, later on a busy machine.
EXPORTED_S = 600
LINE = 30  # enough jobs to keep two engines busy for longer than the time between two counts
# Labels that Ray adds to every series, and the label of a histogram's buckets.
RAYS_LABELS = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "le"}
RAYS_PREFIXES = ("otel_scope_",)


async def _scrape(stack: Stack) -> Mapping[str, set[frozenset[str]]]:
    """Return our exported metrics by name with the label sets of their series."""
    record = await asyncio.to_thread(lambda: stack.record)
    assert record.metrics is not None
    async with httpx.AsyncClient(trust_env=False) as http:
        text = (await http.get(record.metrics)).text
    found: dict[str, set[frozenset[str]]] = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        if name.startswith(f"{PREFIX}restore_"):
            found[name] = {frozenset(_own(sample.labels)) for sample in family.samples}
    return found


def _own(labels: Mapping[str, str]) -> set[str]:
    return {name for name in labels if not name.startswith(RAYS_PREFIXES)} - RAYS_LABELS


# ComfyUI executes no loader for models that are already loaded.
REQUEST = "POST /api/v1/restorations"
SPANS = {
    REQUEST,
    "submit",
    "examine",
    "store_input",
    "record",
    "queue",
    "attempt",
    "fetch",
    "staged",
    "engine",
    "node LoadImage",
    "node ImageUpscaleWithModel",
    "encode",
    "store",
    "finish",
    "webhook",
}


@pytest.mark.metrics
async def test_one_trace_from_the_request_to_the_last_node(
    stack: Stack, collector: Collector
) -> None:
    """The caller's trace contains the request, the submission, the wait, the attempt and its
    stages, each ComfyUI node by class, and the webhook; the receiver gets the trace context."""
    trace_id = secrets.token_hex(16)
    async with receiving() as receiver:
        await asyncio.to_thread(_submit_in, trace_id, stack, receiver)
        await receiver.wait_for(1)

    async def is_whole() -> bool:
        return SPANS <= {span.name for span in collector.of_trace(trace_id)}

    await until(is_whole)
    spans = collector.of_trace(trace_id)
    ids = {span.span_id for span in spans}
    outside = {span.name for span in spans if span.parent not in ids}
    assert outside == {REQUEST}, "every other span is below one of ours"
    told = {f"00-{trace_id}-{span.span_id}-01" for span in spans if span.name == "webhook"}
    assert receiver.seen[0].headers["traceparent"] in told


def _submit_in(trace_id: str, stack: Stack, receiver: Receiver) -> None:
    with stack.http() as http:
        answer = http.post(
            "/api/v1/restorations",
            files={"image": ("a.png", photo((64, 64)))},
            data={"workflow": "enlarge", "webhook_url": receiver.url()},
            headers={"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"},
        )
    assert answer.status_code == 202, answer.text
    assert answer.json()["trace_id"] == trace_id


@pytest.mark.usage
def test_gpu_seconds_of_a_job_are_summed(stack: Stack) -> None:
    """The usage equals the job's execution time in its timings, also on the command line."""
    sub = f"payer-{secrets.token_hex(4)}"
    with stack.client(sub) as client:
        job = client.wait(client.submit(photo((64, 64)), workflow="enlarge").id)
        # The last report is recorded right after the job's end.
        row, deadline = None, time.monotonic() + DEADLINE_S
        while row is None or row.gpu_s < job.timings_s["engine"] - 0.01:
            assert time.monotonic() < deadline, row
            time.sleep(0.1)
            row = next(iter(client.usage(job.created_at - timedelta(hours=1)).usage), None)
    assert (row.owner, row.workflow, row.jobs) == (sub, "enlarge", 1)
    assert job.finished_at is not None
    assert row.gpu_s <= (job.finished_at - job.created_at).total_seconds()
    told = stack.restore("usage", "--since", "7d", "--token", stack.token(sub)).stdout
    assert sub in told
    assert f"{row.gpu_s:.1f}" in told


@pytest.mark.metrics
async def test_what_is_documented_is_exported(stack: Stack) -> None:
    """After a job, a webhook and a refusal, Ray's agent exports each metric with exactly its
    labels. Metrics of GPU memory need a GPU."""
    async with receiving() as receiver:
        await asyncio.to_thread(_work, stack, receiver)
        await receiver.wait_for(1)
    expected = {
        metric.exported: {frozenset(metric.labels)} for metric in METRICS if not metric.gpu_only
    }

    found = await _scrape(stack)
    deadline = time.monotonic() + EXPORTED_S
    while missing := expected.keys() - found.keys():
        assert time.monotonic() < deadline, missing
        await asyncio.sleep(1)
        found = await _scrape(stack)
    assert {name: labels for name, labels in found.items() if name in expected} == expected
    assert found.keys() <= {metric.exported for metric in METRICS}
    assert {m.kind for m in METRICS if m.exported in found} == set(Kind)


def _work(stack: Stack, receiver: Receiver) -> None:
    with stack.client() as client:
        for _ in range(LINE):  # A job that ends before the next count is in no gauge.
            client.submit(photo((96, 96)), workflow="enlarge")
        job = client.submit(photo((64, 64)), workflow="enlarge", webhook_url=receiver.url())
        client.wait(job.id)
        with pytest.raises(ApiError):
            client.submit(b"no picture", workflow="enlarge")
