"""Point 7: one trace for each job, from its request to the last node and the webhook."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import pairwise

import pytest
from opentelemetry.trace import SpanKind, format_span_id, get_current_span

from actors.execution.attempt import Execution, Lease
from actors.execution.engine_schedule import EngineOccupancy, EngineSchedule
from actors.observability.tracing import (
    SpanObserver,
    context_of,
    current_traceparent,
    trace_id_of,
    tracer,
    tracer_provider,
)
from restoration.engine_port import EngineNode
from restoration.errors import EngineCrashed
from restoration.jobs import Job
from tests.fakes.collector import collecting
from tests.fakes.engine import MemoryEngine
from tests.fakes.images import ImagesHere
from tests.fakes.site import API, Site, open_site, photo, submission
from tests.fakes.spans import RecordedSpans
from workflows.catalog import load_catalog

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{CALLER}-01"
REQUEST = f"POST {API}"

pytestmark = pytest.mark.metrics


@pytest.fixture
def spans() -> RecordedSpans:
    return RecordedSpans()


def test_context_survives_a_row(spans: RecordedSpans) -> None:
    """A span that starts from the row's text is below the one that was current."""
    with tracer.start_as_current_span("submit"):
        row = current_traceparent()
    tracer.start_span("attempt", context_of(row)).end()
    assert spans.tree() == {"submit": None, "attempt": "submit"}
    assert spans.traces() == {trace_id_of(row)}


@pytest.mark.parametrize("row", [None, "", "nonsense", f"00-{'0' * 32}-{CALLER}-01"])
def test_without_a_valid_context_a_new_trace_begins(row: str | None, spans: RecordedSpans) -> None:
    assert trace_id_of(row) is None
    tracer.start_span("attempt", context_of(row)).end()
    assert spans.tree() == {"attempt": None}


def test_nothing_is_current_outside_of_a_trace(spans: RecordedSpans) -> None:
    with suppress(EngineCrashed), tracer.start_as_current_span("submit"):
        raise EngineCrashed("it died")
    assert current_traceparent() is None
    assert spans.one("submit").status.description == "EngineCrashed: it died"


async def _submit(site: Site, **headers: str) -> str:
    async with site.client() as client:
        answer = await client.post(API, **submission(workflow="restore"), headers=headers)
    assert answer.status_code == 202
    trace_id: str = answer.json()["trace_id"]
    return trace_id


async def _execute(site: Site, engine: MemoryEngine) -> Job:
    execution = Execution(
        load_catalog(),
        site.jobs,
        site.blobs,
        engine,
        ImagesHere(),
        lambda *_: None,
        Lease(1, 60),
        observer=SpanObserver(),
    )
    job = await site.jobs.claim("worker", 60, ["restore"])
    assert job is not None
    await execution.run(job, EngineOccupancy(EngineSchedule(1)))
    return job


async def test_a_job_is_in_the_trace_of_its_request(spans: RecordedSpans) -> None:
    """The caller's trace continues to the row that the worker will claim; the answer names it."""
    async with open_site() as site:
        assert await _submit(site, traceparent=HEADER) == TRACE
        [job] = site.jobs.rows.values()
    assert trace_id_of(job.traceparent) == TRACE


async def test_without_a_caller_each_job_has_a_trace_of_its_own(spans: RecordedSpans) -> None:
    """Log lines can be separated by it. An invalid header is ignored."""
    async with open_site() as site:
        first, second = await _submit(site), await _submit(site, traceparent="nonsense")
    assert first != second
    assert len(first) == len(second) == 32


async def test_health_checks_are_not_traced(spans: RecordedSpans) -> None:
    async with open_site() as site, site.client() as client:
        assert (await client.get("/healthz")).status_code == 200
    assert not spans.spans


async def test_from_the_request_to_the_last_node(spans: RecordedSpans) -> None:
    """Request, submission, wait, attempt, stages and nodes are one tree in one trace."""
    async with open_site() as site:
        await _submit(site, traceparent=HEADER)
        engine = MemoryEngine(photo(), [EngineNode("LoadImage"), EngineNode("SaveImage")])
        job = await _execute(site, engine)
    assert spans.tree() == {
        REQUEST: None,
        **{"submit": REQUEST, "examine": "submit", "store_input": "submit", "record": "submit"},
        **{"queue": "submit", "attempt": "submit"},
        **dict.fromkeys(("fetch", "staged", "engine", "encode", "store", "finish"), "attempt"),
        **dict.fromkeys(("node LoadImage", "node SaveImage"), "engine"),
    }
    assert spans.traces() == {TRACE}
    request, attempt = spans.one(REQUEST), spans.one("attempt")
    assert request.kind is SpanKind.SERVER
    assert request.parent is not None
    assert format_span_id(request.parent.span_id) == CALLER
    assert attempt.attributes is not None
    assert attempt.attributes["job.outcome"] == "succeeded"
    times = [spans.times(name) for name in ("attempt", "engine", "node LoadImage")]
    for (outer_start, outer_end), (start, end) in pairwise(times):
        assert outer_start <= start <= end <= outer_end
    [run] = engine.runs
    assert run.log_context == {"job_id": str(job.id), "attempt": 1, "trace_id": TRACE}


async def test_a_failed_attempt_shows_its_code(spans: RecordedSpans) -> None:
    async with open_site() as site:
        await _submit(site, traceparent=HEADER)
        await _execute(site, MemoryEngine(photo(), error=EngineCrashed("it died")))
    assert spans.one("attempt").status.description == "engine_crashed"


async def test_a_collector_gets_sampled_spans_alone() -> None:
    """The caller's flag decides; without a caller, a trace is sampled."""
    with collecting() as collector:
        provider = tracer_provider(f"{collector.url}/", "worker")
        traced = provider.get_tracer("test")
        with traced.start_as_current_span("sampled", context_of(HEADER)):
            traced.start_span("inner").end()
        traced.start_span("unsampled", context_of(HEADER[:-2] + "00")).end()
        traced.start_span("root", context_of(None)).end()
        await asyncio.to_thread(provider.shutdown)
    by_name = {span.name: span for span in collector.spans}
    assert by_name.keys() == {"sampled", "inner", "root"}
    assert {span.part for span in collector.spans} == {"worker"}
    assert (by_name["sampled"].trace_id, by_name["sampled"].parent) == (TRACE, CALLER)
    assert by_name["inner"].parent == by_name["sampled"].span_id
    assert by_name["root"].parent == ""


@pytest.mark.parametrize("flag", ["00", "01"])
def test_without_a_collector_traces_have_ids_and_keep_the_callers_flag(flag: str) -> None:
    """Receivers of webhooks and readers of logs need them."""
    traced = tracer_provider(None, "worker").get_tracer("test")
    with traced.start_as_current_span("called", context_of(HEADER[:-2] + flag)):
        traceparent = current_traceparent()
    assert traceparent is not None
    assert trace_id_of(traceparent) == TRACE
    assert traceparent.endswith(f"-{flag}")
    with traced.start_as_current_span("root"):
        root = get_current_span().get_span_context()
        assert root.is_valid
        assert not root.trace_flags.sampled
