"""The spans of this process, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_trace_id


@cache
def _exporter() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)  # possible only once in a process
    return exporter


@dataclass(frozen=True)
class RecordedSpans:
    """The spans that ended since this was created."""

    def __post_init__(self) -> None:
        _exporter().clear()

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return _exporter().get_finished_spans()

    def one(self, name: str) -> ReadableSpan:
        [span] = [span for span in self.spans if span.name == name]
        return span

    def times(self, name: str) -> tuple[int, int]:
        """Return when a span began and ended, in nanoseconds since the epoch."""
        span = self.one(name)
        assert span.start_time is not None
        assert span.end_time is not None
        return span.start_time, span.end_time

    def tree(self) -> dict[str, str | None]:
        """Map each span's name to its parent's name; None if the parent is not among these
        spans."""
        names = {_context(span).span_id: span.name for span in self.spans}
        return {
            span.name: names.get(span.parent.span_id) if span.parent else None
            for span in self.spans
        }

    def traces(self) -> set[str]:
        return {format_trace_id(_context(span).trace_id) for span in self.spans}


def _context(span: ReadableSpan) -> trace.SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context
