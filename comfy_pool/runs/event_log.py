"""Derive a run's outcome from its events, without I/O.

ComfyUI's history is authoritative, but reading it costs a request for each run. Events can be lost,
but those received are true. If all events of a success with handed-over pixels have arrived, the
history entry follows from them. In all other cases the history must be read.
"""

from __future__ import annotations

from contextlib import suppress

from comfy_pool.protocol.messages import (
    Executed,
    Executing,
    MalformedMessage,
    Message,
    NodeError,
    Succeeded,
)
from comfy_pool.protocol.responses import HistoryEntry, NodeOutput, Status, parse_output


class RunEventLog:
    """The events of one run that concern its outcome. `output_node` makes the picture."""

    def __init__(self, output_node: str) -> None:
        self._output_node = output_node
        self._output: NodeOutput | None = None
        self._succeeded = False
        self._over = False
        self.error: NodeError | None = None

    def take(self, message: Message) -> None:
        match message:
            case NodeError():
                self.error = message
            case Succeeded():
                self._succeeded = True
            case Executing(node=None):
                self._over = True
            case Executed(node=self._output_node, output=output) if output:
                with suppress(MalformedMessage):  # fall back to the history
                    self._output = parse_output(output)

    @property
    def entry(self) -> HistoryEntry | None:
        """The history entry of a successful run, or None if the events do not determine it."""
        output = self._output
        if output is None or not output.pixels or not (self._succeeded and self._over):
            return None
        return HistoryEntry(Status("success"), {self._output_node: output})
