"""What events have told of a run's outcome. Pure.

History is the truth about it, and reading it costs a call for each run. An event can be lost, but
one that came is true: once all of them have come that make a success with handed-over pixels, they
say what history would. In every other case somebody has to look.
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
    """Of one run, whose picture is that of `output_node`."""

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
                with suppress(MalformedMessage):  # history may have it right
                    self._output = parse_output(output)

    @property
    def entry(self) -> HistoryEntry | None:
        """The history entry of a run that is over, as far as an outcome depends on it."""
        output = self._output
        if output is None or not output.pixels or not (self._succeeded and self._over):
            return None
        return HistoryEntry(Status("success"), {self._output_node: output})
