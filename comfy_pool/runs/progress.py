"""Compute a prompt's progress as one fraction from the events of its nodes, without I/O."""

from __future__ import annotations

from collections.abc import Iterator

from comfy_pool.protocol.messages import Cached, Executing, Message, PromptProgress, StepProgress
from restoration.engine_port import EngineNode, EngineProgress, Prompt


class ProgressMeter:
    """Progress of a prompt from 0 to 1, in which each node has an equal share.

    A node that reports steps fills its share in proportion. The fraction never decreases. It may
    stay below 1, since nodes that no output depends on do not run.
    """

    def __init__(self, prompt: Prompt) -> None:
        self._classes = {node_id: str(node["class_type"]) for node_id, node in prompt.items()}
        self._shares: dict[str, float] = {}
        self._running = ""
        self._counts_all = False  # whether this engine sends PromptProgress
        self._last = EngineProgress(0.0, "")

    def events(self, message: Message) -> Iterator[EngineNode | EngineProgress]:
        """Yield the node whose execution this message announces, and the progress if it changed."""
        if isinstance(message, Executing) and message.node in self._classes:
            yield EngineNode(self._classes[message.node])
        if (progress := self.update(message)) is not None:
            yield progress

    def update(self, message: Message) -> EngineProgress | None:
        """Return the progress after this message, or None if it has not changed."""
        match message:
            case Cached(nodes=nodes):
                self._shares |= dict.fromkeys(nodes, 1.0)
            case Executing(node=str(node)):
                if not self._counts_all:
                    self._shares[self._running] = 1.0
                self._running = node
            case StepProgress(node=node, value=value, max=maximum):
                self._shares[node] = _share(value, maximum)
            case PromptProgress(nodes=nodes):
                self._counts_all = True
                for node_id, state in nodes.items():
                    if state.state == "finished":
                        self._shares[node_id] = 1.0
                    elif state.state == "running":
                        self._running = node_id
                        self._shares[node_id] = _share(state.value, state.max)
            case _:
                return None
        done = sum(self._shares.get(node_id, 0.0) for node_id in self._classes)
        fraction = max(self._last.fraction, done / max(len(self._classes), 1))
        # Nodes that a node expands into are not in the prompt: keep the previous class.
        node_class = self._classes.get(self._running, self._last.node_class)
        progress = EngineProgress(fraction, node_class)
        if progress == self._last:
            return None
        self._last = progress
        return progress


def _share(value: float, maximum: float) -> float:
    return min(max(value / maximum, 0.0), 1.0) if maximum > 0 else 0.0
