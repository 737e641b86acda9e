"""Pixels in shared memory: which runs may take them, and that none are left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from comfy_pool import pixels
from comfy_pool.nodes import FOLDER_VARIABLE
from comfy_pool.pixels import pixels_folder, read_hand_over, with_hand_over
from comfy_pool.protocol.responses import HandedOver
from restoration.errors import EngineFailed
from workflows.catalog import load_catalog


@pytest.mark.pixels
def test_saveimage_is_replaced_in_what_is_sent_only() -> None:
    """The node takes the same image under the run's name; the workflow's graph stays unchanged."""
    graph = load_catalog().find("restore").graph
    prompt = with_hand_over(graph, "result", "a-run")
    assert prompt["result"] == {
        "class_type": "ComfyRestoreHandOver",
        "inputs": {"images": ["blended", 0], "name": "a-run"},
    }
    assert graph["result"]["class_type"] == "SaveImage"
    assert {**prompt, "result": graph["result"]} == graph


@pytest.mark.pixels
def test_another_output_node_is_left_alone() -> None:
    """A workflow with another save node uses the plain protocol."""
    prompt = {"9": {"class_type": "SaveAsItLikes", "inputs": {"images": ["1", 0]}}}
    assert with_hand_over(prompt, "9", "a-run") == prompt


@pytest.mark.pixels
@pytest.mark.parametrize(
    ("name", "width"), [("another-run", 4), ("a-run", 5)], ids=["name", "size"]
)
def test_only_what_was_told_of_is_taken(tmp_path: Path, name: str, width: int) -> None:
    """Another run's pixels and a file of another size are not this run's result."""
    (tmp_path / "a-run").write_bytes(bytes(4 * 2 * 3))
    assert read_hand_over(HandedOver("a-run", 4, 2, 3), tmp_path / "a-run").width == 4
    with pytest.raises(EngineFailed):
        read_hand_over(HandedOver(name, width, 2, 3), tmp_path / "a-run")


@pytest.mark.pixels
def test_what_a_killed_worker_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next worker of that name removes it, wherever it lies; other engines' folders stay."""
    memory, otherwise = tmp_path / "memory", tmp_path / "base"
    monkeypatch.setattr(pixels, "_MEMORY", memory)
    for folder in (memory, otherwise):
        for name in ("comfy-restore-8188-old", "comfy-restore-8189-busy"):
            (folder / name).mkdir(parents=True)
            (folder / name / "a-run").write_bytes(b"pixels")
    with pixels_folder("8188", otherwise) as folder:
        assert folder.parent == memory
        assert not list(folder.iterdir())
        assert {path.name for path in memory.iterdir()} == {folder.name, "comfy-restore-8189-busy"}
    assert not folder.exists()
    assert [path.name for path in otherwise.iterdir()] == ["comfy-restore-8189-busy"]


@pytest.mark.pixels
def test_without_enough_memory_the_disk_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If shared memory is missing or small, as in most containers, the disk serves the same way."""
    for memory, enough in ((tmp_path, 2**62), (tmp_path / "missing", 0)):
        monkeypatch.setattr(pixels, "_MEMORY", memory)
        monkeypatch.setattr(pixels, "_ENOUGH_BYTES", enough)
        with pixels_folder("8188", tmp_path / "base") as folder:
            assert folder.parent == tmp_path / "base"


@pytest.mark.pixels
@pytest.mark.parametrize("ours", [True, False])
def test_what_an_engine_has_loaded_is_not_looked_through_again(ours: bool) -> None:
    """Garbage collections skip it in our engines, and in no other process."""
    told = subprocess.run(
        [sys.executable, "-c", "import gc, comfy_pool.nodes; print(gc.get_freeze_count())"],
        env={FOLDER_VARIABLE: "pixels"} if ours else {},
        capture_output=True,
        check=True,
    )
    assert (int(told.stdout) > 0) == ours
