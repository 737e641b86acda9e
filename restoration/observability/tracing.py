"""Where in a trace we are: W3C Trace Context, and spans as they are told once they are over.

A trace is one of the caller's, or begins here. It travels with a job through Postgres, since the
worker that claims it is not called by whoever submitted it. https://www.w3.org/TR/trace-context/
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
# Version 00; later ones may have more behind it, and are to be read as this one.
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span's place: 32 and 16 digits of hex; `sampled`: somebody wants to see it."""

    trace_id: str
    span_id: str
    sampled: bool = True

    @classmethod
    def new(cls, *, sampled: bool = False) -> Self:
        return cls(secrets.token_hex(16), secrets.token_hex(8), sampled)

    @classmethod
    def parse(cls, header: str | None) -> Self | None:
        """None for what is no `traceparent`: the trace begins here then, as W3C has it."""
        match = _TRACEPARENT.fullmatch(header or "")
        if match is None or (match[1] == "00" and match[5]):
            return None
        return cls(match[2], match[3], bool(int(match[4], 16) & _SAMPLED))

    @property
    def header(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"

    def child(self) -> TraceContext:
        """A new span in the same trace."""
        return replace(self, span_id=secrets.token_hex(8))


@dataclass(frozen=True, slots=True)
class Span:
    """Something that is over; times in seconds since the epoch. `error` says what went wrong."""

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
        """Whether traces that begin here are to be seen; a caller's say so themselves."""

    def record(self, span: Span) -> None:
        """Take a span; never blocks, never fails."""


class NullTracer:
    """For whoever traces nothing: contexts are passed on, and no span is told."""

    samples = False

    def record(self, span: Span) -> None: ...


_current: ContextVar[TraceContext | None] = ContextVar("trace", default=None)


def current() -> TraceContext | None:
    """The span that this code runs under, if there is one."""
    return _current.get()


@contextmanager
def spanning(
    tracer: Tracer,
    name: str,
    attributes: Mapping[str, str | int | float] | None = None,
    kind: Literal["internal", "server", "client"] = "internal",
    parent: TraceContext | None = None,
) -> Iterator[TraceContext]:
    """The block as a span: below `parent`, else below the current one, else of a new trace."""
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
