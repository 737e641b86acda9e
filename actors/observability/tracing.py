"""Traces with OpenTelemetry. https://www.w3.org/TR/trace-context/

A job has one trace: its request, the steps of the submission, the wait in the queue, each attempt
with its stages, each node in ComfyUI, and the webhook. Its row carries the context of the
submission as `traceparent`, because a worker claims the job there and is called by no submitter.
"""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import Span, Status, StatusCode, format_trace_id, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from actors.observability.observers import NO_CODE, how_it_ended, queued_s
from actors.observability.timings import ENGINE, Lap, Stopwatch
from restoration.jobs import Job

SERVICE = "comfy-restore"
TRACEPARENT = "traceparent"
W3C = TraceContextTextMapPropagator()

tracer = trace.get_tracer(SERVICE)


def tracer_provider(endpoint: str | None, part: str) -> TracerProvider:
    """Return a provider that sends spans over OTLP/HTTP to the collector at `endpoint`.

    Without a collector, spans have ids for logs and webhooks, and none is recorded. `part` names
    the part of the service in the spans' resource.
    """
    resource = Resource.create({"service.name": SERVICE, "comfy_restore.part": part})
    if endpoint is None:
        return TracerProvider(ParentBased(ALWAYS_OFF), resource)
    # Imported here, so that only processes with a collector load it and start its thread.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def current_traceparent() -> str | None:
    """Return the context of the current span for a header or a row, or None outside of a trace."""
    carrier: dict[str, str] = {}
    W3C.inject(carrier)
    return carrier.get(TRACEPARENT)


def context_of(traceparent: str | None) -> Context:
    """Return the context for a span below `traceparent`; if that is invalid, of a new trace."""
    return W3C.extract({} if traceparent is None else {TRACEPARENT: traceparent})


def trace_id_of(traceparent: str | None) -> str | None:
    context = get_current_span(context_of(traceparent)).get_span_context()
    return format_trace_id(context.trace_id) if context.is_valid else None


class SpanObserver:
    """An observer that records the spans of an attempt when it is over."""

    def executed(self, job: Job, gpu_s: float, more_s: float) -> None: ...

    def ended(self, job: Job, watch: Stopwatch, ended: Job | None) -> None:
        if trace_id_of(job.traceparent) is None:
            return
        submitted = context_of(job.traceparent)
        if job.started_at is not None:  # times of Postgres' clock, unlike those of other spans
            _record(Lap("queue", job.available_at.timestamp(), queued_s(job)), "queue", submitted)
        laps = watch.stages
        if not laps:
            return
        outcome, code = how_it_ended(ended)
        attempt = tracer.start_span(
            "attempt",
            submitted,
            attributes={
                "job.id": str(job.id),
                "job.attempt": job.attempt,
                "job.workflow": job.workflow,
                "job.outcome": outcome,
                "worker": job.worker or "",
            },
            start_time=_nanoseconds(laps[0].began_at),
        )
        if code != NO_CODE:
            attempt.set_status(Status(StatusCode.ERROR, code))
        for lap in laps:
            stage = _record(lap, lap.name, trace.set_span_in_context(attempt))
            if lap.name == ENGINE:
                for node in watch.nodes:
                    _record(node, f"node {node.name}", trace.set_span_in_context(stage))
        attempt.end(_nanoseconds(laps[-1].began_at + laps[-1].took_s))


def _record(lap: Lap, name: str, parent: Context) -> Span:
    span = tracer.start_span(name, parent, start_time=_nanoseconds(lap.began_at))
    span.end(_nanoseconds(lap.began_at + lap.took_s))
    return span


def _nanoseconds(at_s: float) -> int:
    return int(at_s * 1e9)
