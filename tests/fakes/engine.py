"""An in-memory Engine whose runs take as long, and end, as a test wants.

It is for tests of code that uses an engine; tests/contracts checks engines themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from restoration.engine_port import (
    EngineBegan,
    EngineEvent,
    EngineResult,
    EngineRun,
    EngineStaged,
    Prompt,
)
from restoration.errors import EngineInterrupted


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class MemoryEngine:
    """`error`, if set, is raised instead of returning `result`; `runs` and `prompts` record the
    input."""

    result: EngineResult
    events: Sequence[EngineEvent] = ()
    starts: int = 1
    error: Exception | None = None
    runs: list[EngineRun] = field(default_factory=list)
    prompts: dict[UUID, Prompt] = field(default_factory=dict)
    interrupted: set[UUID] = field(default_factory=set)
    stopped: list[UUID] = field(default_factory=list)  # runs whose caller was cancelled
    running: asyncio.Event = field(default_factory=asyncio.Event)
    turn: asyncio.Event = field(default_factory=_set)  # clear it to make runs wait in the queue
    go_on: asyncio.Event = field(default_factory=_set)  # clear it to keep runs from ending
    may_stop: asyncio.Event = field(default_factory=_set)  # clear it to be slow to let go of one

    async def start(self) -> None:
        """Return at once: the engine is always ready."""

    async def run(self, run: EngineRun, on_event: Callable[[EngineEvent], None]) -> EngineResult:
        self.runs.append(run)
        self.prompts[run.id] = run.render(f"{run.id}/input{run.image_suffix}", f"{run.id}/output")
        on_event(EngineStaged())
        self.running.set()
        try:
            await self.turn.wait()
            on_event(EngineBegan())
            for event in self.events:
                on_event(event)
            await self.go_on.wait()
        except asyncio.CancelledError:
            await self.may_stop.wait()
            self.stopped.append(run.id)
            raise
        if run.id in self.interrupted:
            raise EngineInterrupted("stopped on request")
        if self.error is not None:
            raise self.error
        return self.result

    async def interrupt(self, run_id: UUID) -> None:
        """End all held runs, and interrupt this one. Ignore an unknown run, as a real engine
        does."""
        if run_id in self.prompts:
            self.interrupted.add(run_id)
            self.go_on.set()
