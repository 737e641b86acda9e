"""Records the spans of attempts, and chooses the tracer. No Ray.

A job has one trace: its request, the steps of the submission, the wait in the queue, each attempt
with its stages, each node in ComfyUI, and the webhook.
"""

from __future__ import annotations

from actors.observability.observers import NO_CODE, how_it_ended
from actors.observability.timings import ENGINE, Lap, Stopwatch
from restoration.jobs import Job
from restoration.observability.tracing import NullTracer, Span, TraceContext, Tracer
from restoration.settings import Settings


def tracer_from(settings: Settings, part: str) -> Tracer:
    """Return a tracer to the collector in the settings, or one that does nothing without it."""
    if settings.otlp_endpoint is None:
        return NullTracer()
    # Imported here, so that only processes with a collector load it and start its thread.
    from actors.observability.otel import OtelTracer, to_collector

    return OtelTracer(part, to_collector(settings.otlp_endpoint))


class SpanObserver:
    """An observer that records the spans of an attempt when it is over."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def executed(self, job: Job, more_s: float) -> None: ...

    def ended(self, job: Job, watch: Stopwatch, ended: Job | None) -> None:
        if (submitted := TraceContext.parse(job.traceparent)) is None:
            return
        self._tell_wait(job, submitted)
        outcome, code = how_it_ended(ended)
        attempt, laps = submitted.child(), watch.stages
        if not laps:
            return
        self._tracer.record(
            Span(
                *("attempt", attempt, submitted),
                *(laps[0].began_at, laps[-1].began_at + laps[-1].took_s),
                {
                    "job.id": str(job.id),
                    "job.attempt": job.attempt,
                    "job.workflow": job.workflow,
                    "job.outcome": outcome,
                    "worker": job.worker or "",
                },
                None if code == NO_CODE else code,
            )
        )
        for lap in laps:
            stage = self._tell(lap, lap.name, attempt)
            if lap.name == ENGINE:
                for node in watch.nodes:
                    self._tell(node, f"node {node.name}", stage)

    def _tell_wait(self, job: Job, submitted: TraceContext) -> None:
        if job.started_at is not None:  # times of Postgres' clock, unlike those of other spans
            waited = (job.available_at.timestamp(), job.started_at.timestamp())
            self._tracer.record(Span("queue", submitted.child(), submitted, *waited))

    def _tell(self, lap: Lap, name: str, parent: TraceContext) -> TraceContext:
        here = parent.child()
        self._tracer.record(Span(name, here, parent, lap.began_at, lap.began_at + lap.took_s))
        return here
