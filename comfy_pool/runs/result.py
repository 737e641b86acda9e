"""Convert an ended prompt into its one picture or a typed error, without I/O."""

from __future__ import annotations

from comfy_pool.protocol.messages import NodeError
from comfy_pool.protocol.responses import HandedOver, HistoryEntry, OutputImage
from restoration.errors import (
    EngineCrashed,
    EngineError,
    EngineFailed,
    EngineInterrupted,
    EngineOutOfMemory,
)

# The types are torch.OutOfMemoryError, MemoryError and numpy's _ArrayMemoryError. torch's CPU
# allocator and some CUDA libraries raise RuntimeError, recognised by its message.
_MEMORY_TYPES = ("OutOfMemoryError", "MemoryError")
_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "not enough memory")


def output_of(
    entry: HistoryEntry,
    output_node: str,
    folder: str,
    *,
    stop_asked: bool,
    error_event: NodeError | None = None,
) -> OutputImage | HandedOver:
    """Return the picture that `output_node` saved in `folder`, or the pixels it handed over.

    `error_event` is an error event, used if the history has neither an error nor a picture.

    For an interrupted run, raises EngineInterrupted if `stop_asked`, otherwise the retryable
    EngineCrashed: another client interrupted it. Raises EngineOutOfMemory or EngineFailed if a node
    raised, and EngineFailed unless there is exactly one picture, in `folder`.
    """
    if entry.interrupted:
        if stop_asked:
            raise EngineInterrupted("the run was interrupted")
        raise EngineCrashed("the run was interrupted by another client")
    if (error := entry.error) is not None:
        raise error_of(error)
    output = entry.outputs.get(output_node)
    if output is not None and output.pixels:
        return output.pixels[0]
    images = output.images if output is not None else ()
    if not images and error_event is not None:
        # A node that blocks the execution of others reports it in an event, not in the history.
        raise error_of(error_event)
    if len(images) != 1:
        # LoadImage loads an animation as a batch with one picture for each frame.
        raise EngineFailed(
            f"node {output_node} saved {len(images)} images; expected one",
            status=entry.status.status_str,
        )
    image = images[0]
    if image.subfolder.replace("\\", "/") != folder:
        # If the whole prompt was cached, ComfyUI names the file of an earlier run.
        raise EngineFailed(
            f"node {output_node} saved its image outside of the run's folder: it does not "
            "use the output prefix"
        )
    return image


def error_of(error: NodeError) -> EngineError:
    """Convert a node's exception to EngineOutOfMemory or EngineFailed."""
    message = error.exception_message.strip()
    details = {"node": error.node_id, "node_class": error.node_type, "type": error.exception_type}
    if error.exception_type.endswith(_MEMORY_TYPES) or any(
        phrase in message.lower() for phrase in _MEMORY_PHRASES
    ):
        return EngineOutOfMemory(f"{error.node_type} ran out of memory: {message}", **details)
    return EngineFailed(f"{error.node_type} failed: {message}", **details)
