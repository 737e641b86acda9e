"""The seam to ComfyUI: what the core asks of an engine, and what an engine tells of a run.

Every implementation raises errors of `restoration.errors` only. `tests/contracts/engine` holds its
rules, for the stand-in and for the real ComfyUI.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

Prompt = Mapping[str, Any]  # a workflow graph in ComfyUI's API format


@dataclass(frozen=True, slots=True)
class EngineBegan:
    """The run's turn has come: it executes from now on. Told once, before its progress."""


@dataclass(frozen=True, slots=True)
class EngineProgress:
    """`fraction` from 0 to 1 over the whole prompt; `node_class` is what runs now."""

    fraction: float
    node_class: str


@dataclass(frozen=True, slots=True)
class EngineNode:
    """A node of the run executes from now on; of one whose result is there already nothing is
    told."""

    node_class: str


@dataclass(frozen=True, slots=True)
class EnginePreview:
    data: bytes
    content_type: str


EngineEvent = EngineBegan | EngineNode | EngineProgress | EnginePreview


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One prompt to run on one picture.

    `id` is used once: it is ComfyUI's prompt id, and names the run's folders. `render` makes the
    prompt from the picture's name inside the engine and the prefix its output must carry. What the
    engine says while it executes the run is logged with the `log_context`.
    """

    id: UUID
    image: bytes
    image_suffix: str  # ".png", ".jpg", ...
    render: Callable[[str, str], Prompt]
    output_node: str
    log_context: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pixels:
    """A picture without a format: rows of 8-bit channels in a file, which its taker deletes."""

    path: Path
    width: int
    height: int
    channels: int

    async def discard(self) -> None:
        """Delete the file, also if the caller is cancelled meanwhile.

        In a thread: to free a large file in memory takes milliseconds.
        """
        await asyncio.shield(asyncio.to_thread(self.path.unlink, missing_ok=True))


EngineResult = bytes | Pixels  # a PNG, or what would have been in it


@dataclass(frozen=True, slots=True)
class Vram:
    """A GPU's memory."""

    total_bytes: int
    free_bytes: int


class Engine(Protocol):
    """One ComfyUI. Only EngineError comes out of it."""

    @property
    def starts(self) -> int:
        """How often it was started: after another start, nothing that it had loaded is left."""

    async def start(self) -> None:
        """Ready for `run` on return. Raises EngineUnavailable."""

    async def run(self, run: EngineRun, on_event: Callable[[EngineEvent], None]) -> EngineResult:
        """The picture that `output_node` saved; nothing of the run is left in the engine.

        Raises EngineInterrupted after `interrupt`, and the other EngineErrors as they say. When
        the calling task is cancelled, the run is interrupted before CancelledError goes on.
        """

    async def interrupt(self, run_id: UUID) -> None:
        """Ask for the end of a queued or running run; its `run` call tells the outcome."""

    async def healthy(self) -> bool: ...

    async def aclose(self) -> None: ...
