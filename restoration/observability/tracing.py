"""W3C Trace Context, spans, and the Tracer port. https://www.w3.org/TR/trace-context/

A trace comes from the caller or begins here. A job carries its trace context in its Postgres row,
because the worker claims the job there and receives no request from the submitter.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, Self

HEADER = "traceparent"
_SAMPLED = 1
# Version 00. Later versions may append fields, and are parsed as version 00.
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The identity of a span.

    `trace_id` has 32 and `span_id` 16 hex digits. `sampled` is the flag that the trace is recorded.
    """

    trace_id: str
    span_id: str
    sampled: bool = True

    @classmethod
    def new(cls, *, sampled: bool = False) -> Self:
        return cls(secrets.token_hex(16), secrets.token_hex(8), sampled)

    @classmethod
    def parse(cls, header: str | None) -> Self | None:
        """Parse a `traceparent` header. Return None if it is invalid or missing.

        The caller then begins a new trace, as W3C Trace Context requires.
        """
        match = _TRACEPARENT.fullmatch(header or "")
        if match is None or (match[1] == "00" and match[5]):
            return None
        return cls(match[2], match[3], bool(int(match[4], 16) & _SAMPLED))

    @property
    def header(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"

    def child(self) -> TraceContext:
        """Return the context of a new span in the same trace."""
        return replace(self, span_id=secrets.token_hex(8))


@dataclass(frozen=True, slots=True)
class Span:
    """An ended span. Times are seconds since the epoch; `error` is the exception's class name."""

    name: str
    context: TraceContext
    parent: TraceContext | None
    began_at: float
    ended_at: float
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)
    error: str | None = None
    kind: Literal["internal", "server", "client"] = "internal"


class Tracer(Protocol):
    @property
    def samples(self) -> bool:
        """Return whether traces that begin here are sampled; a caller's has its own flag."""

    def record(self, span: Span) -> None:
        """Record an ended span, without blocking or raising."""


class NullTracer:
    """A tracer that records no span. Trace contexts are still passed on."""

    samples = False

    def record(self, span: Span) -> None: ...


_current: ContextVar[TraceContext | None] = ContextVar("trace", default=None)


def current() -> TraceContext | None:
    """Return the context of the current span, or None."""
    return _current.get()


@contextmanager
def spanning(
    tracer: Tracer,
    name: str,
    attributes: Mapping[str, str | int | float] | None = None,
    kind: Literal["internal", "server", "client"] = "internal",
    parent: TraceContext | None = None,
) -> Iterator[TraceContext]:
    """Run the block as a span and record it.

    Its parent is `parent`, or else the current span; without either it begins a new trace.
    """
    above = parent or _current.get()
    here = above.child() if above else TraceContext.new(sampled=tracer.samples)
    token = _current.set(here)
    began_at, error = time.time(), None
    try:
        yield here
    except BaseException as raised:
        error = type(raised).__name__
        raise
    finally:
        _current.reset(token)
        ended_at = time.time()
        tracer.record(Span(name, here, above, began_at, ended_at, attributes or {}, error, kind))


def trace_id_of(traceparent: str | None) -> str | None:
    context = TraceContext.parse(traceparent)
    return context.trace_id if context else None
