"""The decoder of websocket frames: the message for each, and that nothing else results."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_pool.protocol.messages import (
    Cached,
    Executed,
    Executing,
    Hello,
    MalformedMessage,
    Message,
    NodeError,
    NodeState,
    Preview,
    PromptProgress,
    Started,
    StepProgress,
    Succeeded,
    decode,
)


def frame(kind: str, **data: Any) -> str:
    return json.dumps({"type": kind, "data": data})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (frame("status", status={"exec_info": {"queue_remaining": 0}}, sid="c1"), Hello("c1")),
        (frame("execution_start", prompt_id="p", timestamp=1), Started("p")),
        (frame("execution_cached", prompt_id="p", nodes=["1", "2"]), Cached("p", ["1", "2"])),
        (frame("executing", prompt_id="p", node="3", display_node="3"), Executing("p", "3")),
        (frame("executing", prompt_id="p", node=None), Executing("p", None)),
        (
            frame("executed", prompt_id="p", node="3", display_node="3", output={"images": []}),
            Executed("p", "3", {"images": []}),
        ),
        (frame("executed", prompt_id="p", node="3", output=None), Executed("p", "3", None)),
        (frame("execution_success", prompt_id="p", timestamp=1), Succeeded("p")),
        (
            frame("progress", prompt_id="p", node="3", value=2, max=8),
            StepProgress("p", "3", 2, 8),
        ),
        (
            frame(
                "progress_state",
                prompt_id="p",
                nodes={"3": {"value": 1.0, "max": 4.0, "state": "running", "node_id": "3"}},
            ),
            PromptProgress("p", {"3": NodeState("running", 1, 4)}),
        ),
        (
            frame(
                "execution_error",
                prompt_id="p",
                node_id="5",
                node_type="Upscale",
                exception_type="torch.OutOfMemoryError",
                exception_message="Allocation on device",
                traceback=["..."],
            ),
            NodeError("p", "5", "Upscale", "torch.OutOfMemoryError", "Allocation on device"),
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_events_become_messages(text: str, message: Message) -> None:
    """Every event that concerns a run has its own type, regardless of other contents."""
    assert decode(text) == message


@pytest.mark.parametrize(
    "text",
    [
        frame("status", status={"exec_info": {"queue_remaining": 1}}),
        frame("feature_flags", supports_preview_metadata=True),
        frame("crystools.monitor", cpu=3),
        frame("executing", node="3"),
        '{"type": "progress", "data": null}',
        '{"type": "executed"}',
    ],
)
def test_what_concerns_no_run_is_ignored(text: str) -> None:
    """Broadcasts, events of extensions, and events without a prompt id are ignored."""
    assert decode(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"data": {}}',
        frame("progress", prompt_id="p", node="3", value="many", max=8),
        frame("progress", prompt_id="p"),
        frame("progress_state", prompt_id="p", nodes={"3": {"state": "asleep"}}),
        frame("executing", prompt_id=7, node=None),
    ],
)
def test_what_is_not_the_protocol_is_malformed(text: str) -> None:
    """Any frame that cannot be decoded raises one error, which is in this system's tree."""
    with pytest.raises(MalformedMessage, match="malformed"):
        decode(text)


def test_previews_name_their_prompt() -> None:
    """A frame of type 4 carries JSON of its own before the picture."""
    metadata = json.dumps({"prompt_id": "p", "image_type": "image/png", "node_id": "3"}).encode()
    raw = struct.pack(">II", 4, len(metadata)) + metadata + b"PNG..."
    assert decode(raw) == Preview(b"PNG...", "image/png", "p")


@pytest.mark.parametrize(
    ("number", "content_type"), [(1, "image/jpeg"), (2, "image/png"), (9, "image/jpeg")]
)
def test_plain_previews_have_a_type_and_no_prompt(number: int, content_type: str) -> None:
    """A frame of type 1 gives only the picture's encoding."""
    assert decode(struct.pack(">II", 1, number) + b"...") == Preview(b"...", content_type, None)


def test_other_binary_frames_are_ignored() -> None:
    """Texts that nodes send (type 3) and future types are ignored."""
    assert decode(struct.pack(">II", 3, 1) + b"5text") is None
    assert decode(struct.pack(">I", 99)) is None


@pytest.mark.parametrize(
    "raw", [b"", b"\0\0", struct.pack(">I", 1), struct.pack(">I", 4), struct.pack(">II", 4, 9)]
)
def test_truncated_binary_frames_are_malformed(raw: bytes) -> None:
    """A frame that ends before its own header is not decoded as a picture."""
    with pytest.raises(MalformedMessage):
        decode(raw)


@given(
    st.one_of(
        st.binary(),
        st.text(),
        st.builds(
            lambda kind, data: json.dumps({"type": kind, "data": data}),
            st.sampled_from(["status", "executing", "progress", "progress_state"]),
            st.dictionaries(
                st.sampled_from(["prompt_id", "sid", "node", "nodes", "value", "max"]),
                st.one_of(st.none(), st.integers(), st.text(), st.lists(st.text())),
            ),
        ),
    )
)
def test_any_frame_is_a_message_or_nothing_or_malformed(raw: str | bytes) -> None:
    """No frame raises any other error."""
    try:
        message = decode(raw)
    except MalformedMessage:
        return
    assert message is None or isinstance(message, Message)
