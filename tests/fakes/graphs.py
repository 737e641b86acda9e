"""Prompts for engine tests, and runs made of them.

Each graph loads the run's picture, passes it through the nodes in between, and saves it as node
"9". The node classes belong to ComfyUI itself or to tests/fakes/nodes.
"""

from __future__ import annotations

import io
import uuid
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from restoration.engine_port import (
    EngineEvent,
    EnginePreview,
    EngineProgress,
    EngineResult,
    EngineRun,
    Pixels,
    Prompt,
)

OUTPUT_NODE = "9"


def picture(color: str = "teal", size: tuple[int, int] = (12, 8)) -> bytes:
    """Return a PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(picture: EngineResult) -> tuple[tuple[int, int], bytes]:
    """Return the size and RGB bytes of a file, or of handed-over pixels, whose file is deleted."""
    if isinstance(picture, Pixels):
        values = picture.path.read_bytes()
        picture.path.unlink()
        return (picture.width, picture.height), values
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    return image.size, image.tobytes()


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def steps(count: int = 4, step_s: float = 0.02, preview: bool = False) -> dict[str, Any]:
    return node("TestSteps", steps=count, step_s=step_s, preview=preview)


def hold(seconds: float) -> dict[str, Any]:
    return node("TestHold", seconds=seconds)


def fail(message: str, kind: str = "error") -> dict[str, Any]:
    return node("TestRaise", message=message, kind=kind)


def through(*between: dict[str, Any], image: bytes | None = None) -> EngineRun:
    """Return a run that loads `image`, passes it through these nodes and saves it."""

    def render(image_name: str, output_prefix: str) -> Prompt:
        graph = {"1": node("LoadImage", image=image_name)}
        for number, each in enumerate(between, 2):
            linked = {**each["inputs"], "image": [str(number - 1), 0]}
            graph[str(number)] = {**each, "inputs": linked}
        graph[OUTPUT_NODE] = node(
            "SaveImage", images=[str(len(between) + 1), 0], filename_prefix=output_prefix
        )
        return graph

    return EngineRun(uuid.uuid4(), image or picture(), ".png", render, OUTPUT_NODE)


def drawn(color: int, batch_size: int = 1, prefix: str | None = None) -> EngineRun:
    """Return a run that ignores its picture, so that all nodes but the saving one can be cached."""

    def render(_: str, output_prefix: str) -> Prompt:
        drawing = node("EmptyImage", width=12, height=8, batch_size=batch_size, color=color)
        saving = node("SaveImage", images=["1", 0], filename_prefix=prefix or output_prefix)
        return {"1": drawing, OUTPUT_NODE: saving}

    return EngineRun(uuid.uuid4(), picture(), ".png", render, OUTPUT_NODE)


@dataclass
class RunEventLog:
    """Collects the events passed to `on_event`."""

    events: list[EngineEvent] = field(default_factory=list)

    def __call__(self, event: EngineEvent) -> None:
        self.events.append(event)

    @property
    def progress(self) -> list[EngineProgress]:
        return [event for event in self.events if isinstance(event, EngineProgress)]

    @property
    def fractions(self) -> list[float]:
        return [progress.fraction for progress in self.progress]

    @property
    def previews(self) -> list[EnginePreview]:
        return [event for event in self.events if isinstance(event, EnginePreview)]


def ignore(_: EngineEvent) -> None:
    """Ignore the events of a run."""
