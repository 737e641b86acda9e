"""Decode ComfyUI's HTTP responses without I/O: history, queue, prompts, uploads, system.

Each `parse_*` function raises `messages.MalformedMessage` if the data has another shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from comfy_pool.protocol.messages import NodeError, parse
from restoration.engine_port import Vram


@dataclass(frozen=True, slots=True)
class OutputImage:
    """A file saved by an output node. `subfolder` uses the engine's path separators."""

    filename: str
    subfolder: str = ""
    type: str = "output"


@dataclass(frozen=True, slots=True)
class HandedOver:
    """Name and size of the pixels that the node of `comfy_pool.nodes` wrote."""

    name: str
    width: int
    height: int
    channels: int


@dataclass(frozen=True, slots=True)
class NodeOutput:
    images: Sequence[OutputImage] = ()
    pixels: Sequence[HandedOver] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """The final status of a prompt. ComfyUI may leave `status_str` stale: rely on `messages`."""

    status_str: str
    messages: Sequence[tuple[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    status: Status
    outputs: Mapping[str, NodeOutput] = field(default_factory=dict)

    @property
    def interrupted(self) -> bool:
        return any(kind == "execution_interrupted" for kind, _ in self.status.messages)

    @property
    def error(self) -> NodeError | None:
        """The error of the node that failed, None if no node did."""
        for kind, data in self.status.messages:
            if kind == "execution_error":
                return parse(_NODE_ERROR, data, "execution_error")
        return None


@dataclass(frozen=True, slots=True)
class Queue:
    """The ids of the running prompts (at most one) and of the pending ones."""

    running: frozenset[str]
    pending: frozenset[str]


@dataclass(frozen=True, slots=True)
class Accepted:
    prompt_id: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """The prompt failed validation. If `queued`, ComfyUI still runs the valid outputs."""

    message: str
    node_errors: Mapping[str, Sequence[str]]
    queued: bool


PromptAnswer = Accepted | Rejected


@dataclass(frozen=True, slots=True)
class SystemStats:
    """ComfyUI's version, empty if not reported, and the memory of its first GPU, if any."""

    version: str
    vram: Vram | None


@dataclass(frozen=True, slots=True)
class _Problem:
    message: str = ""
    details: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.message, self.details)))


@dataclass(frozen=True, slots=True)
class _NodeProblems:
    class_type: str = "unknown node"
    errors: Sequence[_Problem] = ()


@dataclass(frozen=True, slots=True)
class _PromptBody:
    prompt_id: str | None = None
    error: _Problem | str | None = None
    # older versions send an empty list
    node_errors: Mapping[str, _NodeProblems] | Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class _QueueBody:
    queue_running: Sequence[Sequence[Any]]
    queue_pending: Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True)
class _UploadBody:
    name: str
    subfolder: str = ""


@dataclass(frozen=True, slots=True)
class _Device:
    type: str
    vram_total: int
    vram_free: int


@dataclass(frozen=True, slots=True)
class _System:
    comfyui_version: str = ""


@dataclass(frozen=True, slots=True)
class _SystemBody:
    system: _System = field(default_factory=_System)
    devices: Sequence[_Device] = ()


_NODE_ERROR = TypeAdapter(NodeError)
_HISTORY = TypeAdapter(dict[str, HistoryEntry])
_OUTPUT = TypeAdapter(NodeOutput)
_PROMPT = TypeAdapter(_PromptBody)
_QUEUE = TypeAdapter(_QueueBody)
_UPLOAD = TypeAdapter(_UploadBody)
_SYSTEM = TypeAdapter(_SystemBody)
_NODE_CLASSES = TypeAdapter(dict[str, Any])


def parse_history(body: bytes, prompt_id: str) -> HistoryEntry | None:
    """Parse GET /history/{prompt_id}. Return None if the prompt has not ended or is unknown."""
    return parse(_HISTORY, body, "history").get(prompt_id)


def parse_output(raw: Mapping[str, Any]) -> NodeOutput:
    """Parse the node output that an `executed` event carries."""
    return parse(_OUTPUT, raw, "output of a node")


def parse_queue(body: bytes) -> Queue:
    """Parse GET /queue, whose items have the prompt id as second member."""
    queue = parse(_QUEUE, body, "queue")
    return Queue(_prompt_ids(queue.queue_running), _prompt_ids(queue.queue_pending))


def _prompt_ids(items: Sequence[Sequence[Any]]) -> frozenset[str]:
    return frozenset(str(item[1]) for item in items if len(item) > 1)


def parse_prompt_answer(body: bytes) -> PromptAnswer:
    """Parse the response to POST /prompt, with status 200 or 400.

    ComfyUI answers 200 with non-empty `node_errors` if only some outputs are valid.
    """
    answer = parse(_PROMPT, body, "answer to a prompt")
    node_errors: dict[str, Sequence[str]] = {}
    if isinstance(answer.node_errors, Mapping):
        for node, problems in answer.node_errors.items():
            node_errors[node] = [f"{problems.class_type}: {error}" for error in problems.errors]
    if answer.prompt_id is not None and not node_errors:
        return Accepted(answer.prompt_id)
    first = next((text for texts in node_errors.values() for text in texts), None)
    message = first or str(answer.error or "the prompt is invalid")
    return Rejected(message, node_errors, queued=answer.prompt_id is not None)


def parse_upload(body: bytes) -> str:
    """Parse the response to POST /upload/image. Return the picture's name for LoadImage."""
    upload = parse(_UPLOAD, body, "answer to an upload")
    return f"{upload.subfolder}/{upload.name}" if upload.subfolder else upload.name


def parse_node_classes(body: bytes) -> frozenset[str]:
    """Parse GET /object_info. Return the class names of the engine's nodes."""
    classes = parse(_NODE_CLASSES, body, "list of nodes")
    return frozenset(classes)


def parse_system_stats(body: bytes) -> SystemStats:
    """Parse GET /system_stats.

    For a CPU device ComfyUI reports the machine's memory, which is ignored.
    """
    stats = parse(_SYSTEM, body, "answer to system_stats")
    gpu = next((device for device in stats.devices if device.type != "cpu"), None)
    vram = None if gpu is None else Vram(gpu.vram_total, gpu.vram_free)
    return SystemStats(stats.system.comfyui_version, vram)
