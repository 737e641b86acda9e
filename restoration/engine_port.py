"""The port to ComfyUI: the Engine protocol and the events of a run.

Every implementation raises only errors of `restoration.errors`. The contract suite
`tests/contracts/engine` runs on the fake engine and on the real ComfyUI.
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
class EngineStaged:
    """The engine has the run's picture, and gets its prompt now. Sent once, as the first event."""


@dataclass(frozen=True, slots=True)
class EngineBegan:
    """The engine has begun to execute the run. Sent once, before any progress."""


@dataclass(frozen=True, slots=True)
class EngineProgress:
    """`fraction` is from 0 to 1 over the whole prompt; `node_class` is the executing node's."""

    fraction: float
    node_class: str


@dataclass(frozen=True, slots=True)
class EngineNode:
    """A node of the run has begun to execute. Not sent for a node whose result is cached."""

    node_class: str


@dataclass(frozen=True, slots=True)
class EnginePreview:
    data: bytes
    content_type: str


EngineEvent = EngineStaged | EngineBegan | EngineNode | EngineProgress | EnginePreview


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One prompt to run on one picture.

    `id` must be unique: it is ComfyUI's prompt id and names the run's folders. `render` takes the
    picture's name inside the engine and the prefix of its output, and returns the prompt. Lines
    that the engine prints while it executes the run are logged with `log_context`.
    """

    id: UUID
    image: bytes
    image_suffix: str  # ".png", ".jpg", ...
    render: Callable[[str, str], Prompt]
    output_node: str
    log_context: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pixels:
    """An unencoded picture: rows of 8-bit channels in a file. The receiver deletes the file."""

    path: Path
    width: int
    height: int
    channels: int

    async def discard(self) -> None:
        """Delete the file, even if the caller is cancelled.

        Runs in a thread, because freeing a large file in memory takes milliseconds.
        """
        await asyncio.shield(asyncio.to_thread(self.path.unlink, missing_ok=True))


EngineResult = bytes | Pixels  # a PNG, or its pixels


@dataclass(frozen=True, slots=True)
class Vram:
    """A GPU's memory."""

    total_bytes: int
    free_bytes: int


class Engine(Protocol):
    """One ComfyUI. Its methods raise only EngineError."""

    @property
    def starts(self) -> int:
        """Number of starts so far. A new start means that no model is loaded any more."""

    async def start(self) -> None:
        """Start the engine and wait until it accepts `run`. Raises EngineUnavailable."""

    async def run(self, run: EngineRun, on_event: Callable[[EngineEvent], None]) -> EngineResult:
        """Run the prompt and return the picture that `output_node` saved.

        Leaves nothing of the run in the engine. Raises EngineInterrupted after `interrupt`, and
        other EngineErrors. If the calling task is cancelled, the run is interrupted before
        CancelledError propagates.
        """

    async def interrupt(self, run_id: UUID) -> None:
        """Ask the engine to stop a queued or running run. Its `run` call returns or raises."""
