"""A ComfyUI node that takes the time of a GPU, and no core. For benchmarks only.

It stands for a model on a GPU: the execution thread is held for a stated time, and meanwhile the
machine's cores are free for whatever else there is to do.
"""

import hashlib
import time
from typing import Any

import torch  # type: ignore[import-not-found]

_KEPT = 2  # pictures; one of 4096x4096 takes 200 MB


class BenchmarkGpu:
    """The image, enlarged to `width` x `height`, `seconds` after it was asked for.

    Enlarging is real work for a CPU, so that it is done once for each picture.
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
        return float("nan")  # equal to nothing: ComfyUI caches no result of it

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


NODE_CLASS_MAPPINGS = {"BenchmarkGpu": BenchmarkGpu}
