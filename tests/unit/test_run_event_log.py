"""A run's outcome from events: a success with pixels is complete, and nothing is overstated."""

from __future__ import annotations

from itertools import permutations

import pytest

from comfy_pool.protocol.messages import Executed, Executing, Message, NodeError, Succeeded
from comfy_pool.protocol.responses import HandedOver
from comfy_pool.runs.event_log import RunEventLog

PIXELS = HandedOver("r", 2, 1, 3)
TOLD = {"pixels": [{"name": "r", "width": 2, "height": 1, "channels": 3}]}
ALL: tuple[Message, ...] = (Executed("r", "9", TOLD), Succeeded("r"), Executing("r", None))


def heard(*messages: Message) -> RunEventLog:
    listener = RunEventLog("9")
    for message in messages:
        listener.take(message)
    return listener


def test_all_of_a_success_is_what_history_says() -> None:
    """In any order, the entry has the node's pixels, no error and no interruption."""
    for order in permutations(ALL):
        entry = heard(*order).entry
        assert entry is not None
        assert list(entry.outputs["9"].pixels) == [PIXELS]
        assert (entry.error, entry.interrupted) == (None, False)


@pytest.mark.parametrize("missing", range(len(ALL)))
def test_without_any_of_them_history_is_asked(missing: int) -> None:
    """An event may be lost, or never come because a node raised or was interrupted."""
    assert heard(*ALL[:missing], *ALL[missing + 1 :]).entry is None


@pytest.mark.parametrize(
    "instead",
    [
        Executed("r", "8", TOLD),
        Executed("r", "9", None),
        Executed("r", "9", {}),
        Executed("r", "9", {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]}),
        Executed("r", "9", {"pixels": [{"name": "r"}]}),
        Executed("r", "9", {"pixels": "many"}),
    ],
)
def test_only_pixels_of_the_output_node_count(instead: Executed) -> None:
    """Another node's pixels, a file's name and unknown data do not count."""
    assert heard(instead, *ALL[1:]).entry is None


def test_a_nodes_error_is_kept() -> None:
    """An error that blocks other nodes is reported by event only."""
    error = NodeError("r", "9", "Upscale", "RuntimeError", "no luck")
    assert heard(error).error == error
