"""ComfyUI nodes for benchmarks that take the time of a GPU, but no core.

They replace models on a GPU: the execution thread is held for a given time, while the cores are
free for other work. They log times of the monotonic clock to files in the engine's base directory,
which the benchmarks read.
"""

import hashlib
import time
from pathlib import Path
from typing import Any

import comfy.utils  # type: ignore[import-not-found]
import execution  # type: ignore[import-not-found]
import folder_paths  # type: ignore[import-not-found]
import torch  # type: ignore[import-not-found]

_NEVER_CACHED = float("nan")  # not equal to anything, not even to itself
_KEPT = 2  # pictures; one of 4096x4096 takes 200 MB
_BASE = Path(folder_paths.get_output_directory()).parent
EXECUTIONS = _BASE / "benchmark-executions.txt"  # a line for each prompt: began, ended
STEPS = _BASE / "benchmark-steps.txt"  # a line for each step of BenchmarkSteps: number, time


class BenchmarkGpu:
    """Returns the image, enlarged to `width` x `height`, after `seconds`.

    Enlarging takes CPU time, so that it is done only once for each picture.
    """

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "benchmark"

    def __init__(self) -> None:
        self._enlarged: dict[tuple[object, ...], Any] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE",),
                "width": ("INT", {"default": 1024, "min": 1, "max": 16384}),
                "height": ("INT", {"default": 1024, "min": 1, "max": 16384}),
                "seconds": ("FLOAT", {"default": 0.2, "min": 0.0, "max": 600.0}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:
        return _NEVER_CACHED

    def run(self, image: Any, width: int, height: int, seconds: float) -> tuple[Any]:
        done_at = time.monotonic() + seconds
        key = (hashlib.sha256(image.numpy()).digest(), width, height)
        if key not in self._enlarged:
            while len(self._enlarged) >= _KEPT:
                del self._enlarged[next(iter(self._enlarged))]
            self._enlarged[key] = _enlarge(image, width, height)
        time.sleep(max(0.0, done_at - time.monotonic()))
        return (self._enlarged[key],)


def _enlarge(image: Any, width: int, height: int) -> Any:
    channels_first = image.movedim(-1, 1)
    enlarged = torch.nn.functional.interpolate(channels_first, (height, width), mode="bicubic")
    return enlarged.movedim(1, -1).contiguous()


class BenchmarkModel:
    """Returns the image after loading the model `name`; the engine holds one model at a time."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "benchmark"
    _loaded = ""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE",),
                "name": ("STRING", {"default": ""}),
                "seconds": ("FLOAT", {"default": 2.0, "min": 0.0, "max": 600.0}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:
        return _NEVER_CACHED

    def run(self, image: Any, name: str, seconds: float) -> tuple[Any]:
        if name != BenchmarkModel._loaded:
            time.sleep(seconds)
            BenchmarkModel._loaded = name
        return (image,)


class BenchmarkSteps:
    """Returns the image after `steps` progress steps that are `pause` seconds apart."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "benchmark"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE",),
                "steps": ("INT", {"default": 10, "min": 1, "max": 10000}),
                "pause": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 60.0}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:
        return _NEVER_CACHED

    def run(self, image: Any, steps: int, pause: float) -> tuple[Any]:
        bar = comfy.utils.ProgressBar(steps)
        for step in range(1, steps + 1):
            time.sleep(pause)
            _note(STEPS, step, time.monotonic())
            bar.update_absolute(step)
        return (image,)


def _note(path: Path, *values: float) -> None:
    with path.open("a") as file:
        file.write(" ".join(map(str, values)) + "\n")


def _noted(execute: Any) -> Any:
    def noting(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            return execute(*args, **kwargs)
        finally:
            _note(EXECUTIONS, began, time.monotonic())

    return noting


execution.PromptExecutor.execute = _noted(execution.PromptExecutor.execute)

NODE_CLASS_MAPPINGS = {
    "BenchmarkGpu": BenchmarkGpu,
    "BenchmarkModel": BenchmarkModel,
    "BenchmarkSteps": BenchmarkSteps,
}
