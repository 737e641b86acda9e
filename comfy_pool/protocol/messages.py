"""Decode ComfyUI's websocket messages without I/O; `responses` decodes its HTTP responses.

Each event is a small dataclass; `Message` is their closed union. Fields have ComfyUI's names.
Events that concern no run, or that are not used here, decode to None. Data that the protocol does
not allow raises MalformedMessage. Source: server.py, main.py, execution.py and protocol.py of
ComfyUI 0.3.75.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from restoration.errors import EngineFailed

T = TypeVar("T")


class MalformedMessage(EngineFailed):
    """The data is not ComfyUI's: another server answered, or the protocol has changed."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The first event of a connection; `sid` is its client id."""

    sid: str


@dataclass(frozen=True, slots=True)
class Started:
    prompt_id: str


@dataclass(frozen=True, slots=True)
class Cached:
    """The results of these nodes are cached, so they do not run."""

    prompt_id: str
    nodes: Sequence[str]


@dataclass(frozen=True, slots=True)
class Executing:
    """`node` executes from now on. None means that the prompt has ended and is in the history.

    At any earlier event it is not in the history yet.
    """

    prompt_id: str
    node: str | None


@dataclass(frozen=True, slots=True)
class Executed:
    """The UI output of `node`, in the history's format (see `responses.parse_output`)."""

    prompt_id: str
    node: str
    output: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Succeeded:
    """All nodes have executed; the prompt is not in the history yet."""

    prompt_id: str


@dataclass(frozen=True, slots=True)
class StepProgress:
    """`node` has done `value` of `max` steps."""

    prompt_id: str
    node: str
    value: float
    max: float


@dataclass(frozen=True, slots=True)
class NodeState:
    state: Literal["pending", "running", "finished", "error"]
    value: float
    max: float


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """The state of all nodes that have started. Older versions of ComfyUI only send StepProgress.

    Nodes that another node expands into have ids that are not in the prompt.
    """

    prompt_id: str
    nodes: Mapping[str, NodeState]


@dataclass(frozen=True, slots=True)
class NodeError:
    """A node raised an exception; `exception_type` includes its module."""

    prompt_id: str
    node_id: str
    node_type: str
    exception_type: str
    exception_message: str


@dataclass(frozen=True, slots=True)
class Preview:
    """A preview image. If `prompt_id` is None, it belongs to the executing prompt."""

    image: bytes
    content_type: str
    prompt_id: str | None


Message = (
    Hello
    | Started
    | Cached
    | Executing
    | Executed
    | Succeeded
    | StepProgress
    | PromptProgress
    | NodeError
    | Preview
)


@dataclass(frozen=True, slots=True)
class _Envelope:
    type: str
    data: Any = None


@dataclass(frozen=True, slots=True)
class _PreviewMetadata:
    prompt_id: str | None = None
    image_type: str = "image/jpeg"


# By event type: the key without which an event is ignored, and the shape of its data.
_EVENTS: dict[str, tuple[str, TypeAdapter[Any]]] = {
    "status": ("sid", TypeAdapter(Hello)),
    "execution_start": ("prompt_id", TypeAdapter(Started)),
    "execution_cached": ("prompt_id", TypeAdapter(Cached)),
    "executing": ("prompt_id", TypeAdapter(Executing)),
    "executed": ("prompt_id", TypeAdapter(Executed)),
    "execution_success": ("prompt_id", TypeAdapter(Succeeded)),
    "progress": ("prompt_id", TypeAdapter(StepProgress)),
    "progress_state": ("prompt_id", TypeAdapter(PromptProgress)),
    "execution_error": ("prompt_id", TypeAdapter(NodeError)),
}
_ENVELOPE = TypeAdapter(_Envelope)
_PREVIEW_METADATA = TypeAdapter(_PreviewMetadata)

_PREVIEW, _PREVIEW_WITH_METADATA = 1, 4  # protocol.py: BinaryEventTypes
_IMAGE_TYPES = {1: "image/jpeg", 2: "image/png"}


def decode(frame: str | bytes) -> Message | None:
    """Decode a websocket frame: JSON text, or a binary preview. Raises MalformedMessage.

    Return None for an event that concerns no run or is not used.
    """
    if isinstance(frame, bytes):
        return _decode_binary(frame)
    envelope = parse(_ENVELOPE, frame, "frame")
    key, shape = _EVENTS.get(envelope.type, (None, None))
    if shape is None or not isinstance(envelope.data, dict) or key not in envelope.data:
        return None
    message: Message = parse(shape, envelope.data, envelope.type)
    return message


def _decode_binary(frame: bytes) -> Preview | None:
    try:
        (kind,) = struct.unpack_from(">I", frame)
        if kind == _PREVIEW:
            (image_type,) = struct.unpack_from(">I", frame, 4)
            return Preview(frame[8:], _IMAGE_TYPES.get(image_type, "image/jpeg"), None)
        if kind == _PREVIEW_WITH_METADATA:
            (size,) = struct.unpack_from(">I", frame, 4)
            metadata = parse(_PREVIEW_METADATA, frame[8 : 8 + size], "preview")
            return Preview(frame[8 + size :], metadata.image_type, metadata.prompt_id)
    except struct.error as error:
        raise MalformedMessage(f"ComfyUI sent a binary frame of {len(frame)} bytes") from error
    return None


def parse(shape: TypeAdapter[T], raw: object, what: str) -> T:
    """Validate `raw`, JSON or a decoded value. Raises MalformedMessage, which names `what`."""
    try:
        if isinstance(raw, str | bytes):
            return shape.validate_json(raw)
        return shape.validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        problem = f"{where}: {first['msg']}" if where else first["msg"]
        raise MalformedMessage(f"ComfyUI sent a malformed {what} ({problem})") from error
