"""Point 7: one trace for each job, from its request to the last node and the webhook."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from actors.execution.attempt import EngineOccupancy, Execution, Lease
from actors.observability.otel import OtelTracer
from actors.observability.spans import SpanObserver, tracer_from
from restoration.engine_port import EngineNode
from restoration.errors import EngineCrashed
from restoration.observability.tracing import (
    NullTracer,
    Span,
    TraceContext,
    current,
    spanning,
    trace_id_of,
)
from tests.fakes.engine import MemoryEngine
from tests.fakes.images import ImagesHere
from tests.fakes.site import (
    API,
    Site,
    open_site,
    open_traced_site,
    photo,
    settings_for_tests,
    submission,
)
from tests.fakes.tracer import MemoryTracer
from workflows.catalog import load_catalog

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
HEADER = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.mark.metrics
@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (HEADER, TraceContext(TRACE, "00f067aa0ba902b7", True)),
        (HEADER[:-2] + "00", TraceContext(TRACE, "00f067aa0ba902b7", False)),
        (HEADER[:-2] + "03", TraceContext(TRACE, "00f067aa0ba902b7", True)),
        ("cc" + HEADER[2:] + "-what-comes-later", TraceContext(TRACE, "00f067aa0ba902b7", True)),
        (HEADER + "-what-comes-later", None),
        (HEADER.upper(), None),
        ("ff" + HEADER[2:], None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (HEADER + "\n", None),
        ("", None),
        (None, None),
    ],
)
def test_traceparent_is_read_as_w3c_says(header: str | None, expected: TraceContext | None) -> None:
    """Version 00 exactly, later ones in their known part; any other text is refused."""
    assert TraceContext.parse(header) == expected


@pytest.mark.metrics
def test_what_is_written_can_be_read() -> None:
    """A context survives a header and a row."""
    for sampled in (True, False):
        context = TraceContext.new(sampled=sampled)
        assert TraceContext.parse(context.header) == context


@pytest.mark.metrics
def test_spans_nest() -> None:
    """A span's parent is the surrounding one; an exception ends it with its name and propagates."""
    tracer = MemoryTracer()
    with suppress(EngineCrashed), spanning(tracer, "outer"):
        with spanning(tracer, "inner") as inner:
            assert current() == inner
        raise EngineCrashed("it died")
    assert current() is None
    assert tracer.tree() == {"inner": "outer", "outer": None}
    assert tracer.one("outer").error == "EngineCrashed"
    assert tracer.one("inner").error is None


async def _submit(site: Site, **headers: str) -> str:
    async with site.client() as client:
        answer = await client.post(API, **submission(workflow="restore"), headers=headers)
    assert answer.status_code == 202
    trace_id: str = answer.json()["trace_id"]
    return trace_id


@pytest.mark.metrics
async def test_a_job_is_in_the_trace_of_its_request() -> None:
    """The caller's trace continues to the row that the worker will claim; the answer names it."""
    async with open_site() as site:
        assert await _submit(site, traceparent=HEADER) == TRACE
        [job] = site.jobs.rows.values()
    assert trace_id_of(job.traceparent) == TRACE


@pytest.mark.metrics
async def test_without_a_caller_each_job_has_a_trace_of_its_own() -> None:
    """This holds with or without a collector, so log lines can be separated by it. An invalid
    header is ignored."""
    async with open_site() as site:
        first, second = await _submit(site), await _submit(site, traceparent="nonsense")
    assert first != second
    assert len(first) == len(second) == 32


@pytest.mark.metrics
async def test_from_the_request_to_the_last_node() -> None:
    """Request, submission, wait, attempt, stages and nodes are one tree in one trace."""
    tracer = MemoryTracer()
    async with open_traced_site(tracer) as site:
        await _submit(site, traceparent=HEADER)
        engine = MemoryEngine(photo(), [EngineNode("LoadImage"), EngineNode("SaveImage")])
        execution = Execution(
            *(load_catalog(), site.jobs, site.blobs, engine, ImagesHere()),
            *(lambda *_: None, Lease(1, 60)),
            observer=SpanObserver(tracer),
        )
        job = await site.jobs.claim("worker", 60, ["restore"])
        assert job is not None
        await execution.run(job, EngineOccupancy())
    assert tracer.tree() == {
        "POST": None,
        **{"submit": "POST", "examine": "submit", "store_input": "submit", "record": "submit"},
        **{"queue": "submit", "attempt": "submit"},
        **dict.fromkeys(("fetch", "staged", "engine", "encode", "store", "finish"), "attempt"),
        **dict.fromkeys(("node LoadImage", "node SaveImage"), "engine"),
    }
    assert {span.context.trace_id for span in tracer.spans} == {TRACE}
    request = tracer.one("POST")
    assert request.parent == TraceContext.parse(HEADER)
    assert tracer.one("attempt").attributes["job.outcome"] == "succeeded"
    [run] = engine.runs
    assert run.log_context == {"job_id": str(job.id), "attempt": 1, "trace_id": TRACE}


@pytest.mark.metrics
def test_opentelemetry_gets_the_spans_as_they_are() -> None:
    """Ids, times, kind, attributes and failure arrive; unsampled spans do not."""
    exporter = InMemorySpanExporter()
    tracer = OtelTracer("worker", SimpleSpanProcessor(exporter))
    parent = TraceContext.parse(HEADER)
    assert parent is not None
    here = parent.child()
    tracer.record(Span("attempt", here, parent, 1.5, 2.5, {"job.attempt": 1}, "engine_crashed"))
    tracer.record(Span("root", TraceContext.new(sampled=True), None, 1, 2, kind="server"))
    unseen = replace(parent, sampled=False)
    tracer.record(Span("unseen", unseen.child(), unseen, 1, 2))
    first, root = (json.loads(span.to_json()) for span in exporter.get_finished_spans())
    assert first["context"]["trace_id"] == f"0x{TRACE}"
    assert first["context"]["span_id"] == f"0x{here.span_id}"
    assert first["parent_id"] == f"0x{parent.span_id}"
    assert first["start_time"] == "1970-01-01T00:00:01.500000Z"
    assert first["end_time"] == "1970-01-01T00:00:02.500000Z"
    assert first["attributes"] == {"job.attempt": 1}
    assert first["status"] == {"status_code": "ERROR", "description": "engine_crashed"}
    assert first["resource"]["attributes"]["service.name"] == "comfy-restore"
    assert (root["name"], root["parent_id"], root["kind"]) == ("root", None, "SpanKind.SERVER")


@pytest.mark.metrics
def test_nothing_is_traced_without_a_collector() -> None:
    """There is no thread and no exporter: these settings give the no-op tracer."""
    assert isinstance(tracer_from(settings_for_tests(), "worker"), NullTracer)
