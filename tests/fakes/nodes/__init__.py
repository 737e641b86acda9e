"""Nodes for engine tests, loaded by a real ComfyUI from its custom_nodes folder.

`tests/fakes/comfyui.py` implements the same ones. They take time, report progress, send previews
and fail on demand. MIT, like the rest of this project.
"""

import time
from typing import Any

import torch  # type: ignore[import-not-found]
from comfy.utils import ProgressBar  # type: ignore[import-not-found]
from PIL import Image


class TestSteps:
    """Passes the image on after `steps` steps, each with progress and, if asked, a preview."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE",),
                "steps": ("INT", {"default": 4, "min": 1, "max": 10_000}),
                "step_s": ("FLOAT", {"default": 0.05, "min": 0.0, "max": 60.0}),
                "preview": ("BOOLEAN", {"default": False}),
            }
        }

    def run(self, image: Any, steps: int, step_s: float, preview: bool) -> tuple[Any]:
        bar = ProgressBar(steps)
        picture = ("JPEG", Image.new("RGB", (8, 8), "red"), 8) if preview else None
        for step in range(steps):
            time.sleep(step_s)
            bar.update_absolute(step + 1, steps, picture)
        return (image,)


class TestHold:
    """Holds the execution thread without events, and cannot be interrupted meanwhile."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",), "seconds": ("FLOAT", {"default": 1.0})}}

    def run(self, image: Any, seconds: float) -> tuple[Any]:
        time.sleep(seconds)
        return (image,)


class TestRaise:
    """Raises `message` as an ordinary error, or as torch's error for a full GPU."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE",),
                "kind": (["error", "out_of_memory"],),
                "message": ("STRING", {"default": ""}),
            }
        }

    def run(self, image: Any, kind: str, message: str) -> tuple[Any]:
        if kind == "out_of_memory":
            raise torch.cuda.OutOfMemoryError(message)
        raise RuntimeError(message)


NODE_CLASS_MAPPINGS = {"TestSteps": TestSteps, "TestHold": TestHold, "TestRaise": TestRaise}
