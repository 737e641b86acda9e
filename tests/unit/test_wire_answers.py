"""The decoders of HTTP responses, and how a history entry becomes a picture or an error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from comfy_pool.protocol import responses
from comfy_pool.protocol.messages import MalformedMessage, NodeError
from comfy_pool.protocol.responses import Accepted, HistoryEntry, OutputImage, Rejected
from comfy_pool.runs.result import output_of
from restoration.errors import (
    EngineCrashed,
    EngineError,
    EngineFailed,
    EngineInterrupted,
    EngineOutOfMemory,
)

IMAGE = {"filename": "output_00001_.png", "subfolder": "runs/p", "type": "output"}


def body(value: Any) -> bytes:
    return json.dumps(value).encode()


def entry(
    *messages: tuple[str, dict[str, Any]], images: list[Any] | None = None, status: str = "success"
) -> HistoryEntry:
    raw = {
        "prompt": [0, "p", {"9": {"class_type": "SaveImage"}}, {}, ["9"]],
        "outputs": {} if images is None else {"9": {"images": images, "animated": [False]}},
        "status": {"status_str": status, "completed": True, "messages": messages},
        "meta": {},
    }
    parsed = responses.parse_history(body({"p": raw}), "p")
    assert parsed is not None
    return parsed


def raised(kind: str, text: str) -> tuple[str, dict[str, Any]]:
    return "execution_error", {
        "prompt_id": "p",
        "node_id": "5",
        "node_type": "Upscale",
        "exception_type": kind,
        "exception_message": text,
        "traceback": [],
    }


def test_history_of_an_unknown_prompt_is_empty() -> None:
    """ComfyUI answers {} for a prompt that has not ended or never was."""
    assert responses.parse_history(b"{}", "p") is None


@pytest.mark.parametrize("raw", [b"<html>", b"[]", b'{"p": {"outputs": 3}}'])
def test_history_that_is_none(raw: bytes) -> None:
    """Any other answer on the port is MalformedMessage."""
    with pytest.raises(MalformedMessage):
        responses.parse_history(raw, "p")


def test_the_queue_is_two_sets_of_ids() -> None:
    """Running prompts are separate from waiting ones."""
    item: list[Any] = [4, "a", {}, {}, []]
    raw = body({"queue_running": [item], "queue_pending": [[5, "b", {}, {}, []]]})
    assert responses.parse_queue(raw) == responses.Queue(frozenset({"a"}), frozenset({"b"}))


def test_an_accepted_prompt() -> None:
    """Without node errors the prompt is queued under its id."""
    raw = body({"prompt_id": "p", "number": 3, "node_errors": {}})
    assert responses.parse_prompt_answer(raw) == Accepted("p")


def test_a_prompt_that_validates_in_part_is_rejected_though_queued() -> None:
    """Rule 7: status 200 with node errors; the answer says that part of it is queued."""
    error = {"type": "value_not_in_list", "message": "Value not in list", "details": "model: 'x'"}
    problems = {"class_type": "Loader", "errors": [error], "dependent_outputs": ["9"]}
    raw = body({"prompt_id": "p", "number": 3, "node_errors": {"4": problems}})
    message = "Loader: Value not in list: model: 'x'"
    assert responses.parse_prompt_answer(raw) == Rejected(message, {"4": [message]}, queued=True)


@pytest.mark.parametrize("node_errors", [{}, []], ids=["object", "list, as older versions send"])
def test_a_prompt_that_is_refused_as_a_whole(node_errors: object) -> None:
    """Without node errors the message is that of the whole prompt."""
    error = {"type": "invalid_prompt", "message": "Node X does not exist.", "details": "Node '#1'"}
    answer = responses.parse_prompt_answer(body({"error": error, "node_errors": node_errors}))
    assert answer == Rejected("Node X does not exist.: Node '#1'", {}, queued=False)


def test_an_upload_is_named_with_its_folder() -> None:
    """LoadImage finds a picture by its folder and its returned name."""
    raw = body({"name": "input (1).png", "subfolder": "runs/p", "type": "input"})
    assert responses.parse_upload(raw) == "runs/p/input (1).png"
    assert responses.parse_upload(body({"name": "a.png"})) == "a.png"


def test_the_output_of_a_success() -> None:
    """There is one picture in the run's folder; on Windows the folder separator differs."""
    success = ("execution_success", {"prompt_id": "p"})
    for subfolder in ("runs/p", "runs\\p"):
        image = {**IMAGE, "subfolder": subfolder}
        found = output_of(entry(success, images=[image]), "9", "runs/p", stop_asked=False)
        assert found == OutputImage("output_00001_.png", subfolder, "output")


@pytest.mark.parametrize(
    ("failed", "error", "text"),
    [
        (entry(raised("RuntimeError", "bad\n")), EngineFailed, "Upscale failed: bad$"),
        (entry(raised("torch.OutOfMemoryError", "full")), EngineOutOfMemory, "full"),
        (entry(raised("numpy._core._exceptions._ArrayMemoryError", "x")), EngineOutOfMemory, "x"),
        (entry(raised("RuntimeError", "CUDA out of memory.")), EngineOutOfMemory, "CUDA"),
        (entry(("execution_interrupted", {}), status="error"), EngineCrashed, "another client"),
        (entry(raised("ValueError", "v"), images=[IMAGE]), EngineFailed, "Upscale failed"),
        (entry(), EngineFailed, "node 9 saved 0 images"),
        (entry(images=[IMAGE, IMAGE]), EngineFailed, "node 9 saved 2 images"),
        (entry(images=[{**IMAGE, "subfolder": "runs/q"}]), EngineFailed, "outside"),
    ],
)
def test_every_other_end_is_an_error(
    failed: HistoryEntry, error: type[EngineError], text: str
) -> None:
    """Rules 5, 13, 15, 17: the error names the cause and whether another attempt helps."""
    with pytest.raises(error, match=text):
        output_of(failed, "9", "runs/p", stop_asked=False)


def test_an_interruption_that_was_asked_for() -> None:
    """The same entry has another meaning if we requested the interruption."""
    with pytest.raises(EngineInterrupted):
        output_of(entry(("execution_interrupted", {})), "9", "runs/p", stop_asked=True)


def test_an_error_that_is_told_by_event_only() -> None:
    """A node that blocks execution gives its reason in an event; history only lacks the output."""
    blocked = NodeError("p", "2", "Gate", "ExecutionBlocked", "Execution Blocked: too dark")
    with pytest.raises(EngineFailed, match="too dark"):
        output_of(entry(), "9", "runs/p", stop_asked=False, error_event=blocked)
    # elsewhere in the graph it does no harm
    found = output_of(entry(images=[IMAGE]), "9", "runs/p", stop_asked=False, error_event=blocked)
    assert isinstance(found, OutputImage)
    assert found.filename == IMAGE["filename"]


@pytest.mark.upgrades
@pytest.mark.parametrize(
    ("system", "version"),
    [({"comfyui_version": "0.3.75", "os": "posix"}, "0.3.75"), ({"os": "posix"}, "")],
)
def test_the_version_is_what_comfyui_says(system: dict[str, str], version: str) -> None:
    """It is empty for a ComfyUI too old to give it."""
    stats = responses.parse_system_stats(body({"system": system, "devices": []}))
    assert stats.version == version
