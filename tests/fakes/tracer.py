"""An in-memory Tracer."""

from __future__ import annotations

from dataclasses import dataclass, field

from restoration.observability.tracing import Span


@dataclass
class MemoryTracer:
    samples: bool = True
    spans: list[Span] = field(default_factory=list)

    def record(self, span: Span) -> None:
        self.spans.append(span)

    def one(self, name: str) -> Span:
        [span] = [span for span in self.spans if span.name == name]
        return span

    def tree(self) -> dict[str, str | None]:
        """Map each span's name to its parent's name; None if the parent is not among these
        spans."""
        names = {span.context.span_id: span.name for span in self.spans}
        return {
            span.name: names.get(span.parent.span_id) if span.parent else None
            for span in self.spans
        }
