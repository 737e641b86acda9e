"""Implements Tracer with OpenTelemetry: a thread sends spans to a collector over OTLP/HTTP.

Imported only if a collector is configured: see `actors.observability.spans`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from restoration.observability.tracing import Span, TraceContext

SERVICE = "comfy-restore"
_KINDS: Mapping[str, SpanKind] = MappingProxyType(
    {
        "internal": SpanKind.INTERNAL,
        "server": SpanKind.SERVER,
        "client": SpanKind.CLIENT,
    }
)


def to_collector(endpoint: str) -> SpanProcessor:
    """Return a processor that exports to `endpoint`.

    Further options are the exporter's own environment variables, OTEL_EXPORTER_OTLP_HEADERS etc.
    """
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces"))


class OtelTracer:
    """Passes spans with their existing ids to an SDK processor. Not thread-safe.

    `part` names the part of the service in the spans' resource.
    """

    samples = True

    def __init__(self, part: str, processor: SpanProcessor) -> None:
        self._ids = _GivenIds()
        resource = Resource.create({"service.name": SERVICE, "comfy_restore.part": part})
        provider = TracerProvider(id_generator=self._ids, resource=resource)
        provider.add_span_processor(processor)
        self._tracer = provider.get_tracer(SERVICE)

    def record(self, span: Span) -> None:
        """Export a finished span."""
        self._ids.given = span.context
        above = None if span.parent is None else NonRecordingSpan(_context_of(span.parent))
        told = self._tracer.start_span(
            span.name,
            None if above is None else set_span_in_context(above),
            _KINDS[span.kind],
            dict(span.attributes),
            start_time=_nanoseconds(span.began_at),
        )
        if span.error is not None:
            told.set_status(Status(StatusCode.ERROR, span.error))
        told.end(_nanoseconds(max(span.began_at, span.ended_at)))


class _GivenIds(IdGenerator):
    """Returns ids chosen before: a span's children and webhook receivers have them already."""

    given: TraceContext

    def generate_span_id(self) -> int:
        return int(self.given.span_id, 16)

    def generate_trace_id(self) -> int:
        return int(self.given.trace_id, 16)


def _context_of(place: TraceContext) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if place.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(place.trace_id, 16), int(place.span_id, 16), True, flags)


def _nanoseconds(at: float) -> int:
    return int(at * 1e9)
