"""Real photos from scikit-learn and scikit-image, a fixed degradation, and SSIM."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import skimage
import sklearn
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import structural_similarity

PhotoName = Literal["flower", "china", "rocket", "astronaut", "coffee", "chelsea"]

_SKLEARN = Path(sklearn.__file__).parent / "datasets" / "images"
_SKIMAGE = Path(skimage.__file__).parent / "data"
_FILES: dict[PhotoName, Path] = {
    "flower": _SKLEARN / "flower.jpg",
    "china": _SKLEARN / "china.jpg",
    "rocket": _SKIMAGE / "rocket.jpg",
    "astronaut": _SKIMAGE / "astronaut.png",
    "coffee": _SKIMAGE / "coffee.png",
    "chelsea": _SKIMAGE / "chelsea.png",
}
NAMES: tuple[PhotoName, ...] = tuple(_FILES)
SHRINK = 4
NOISE_SIGMA = 8.0  # of 255
JPEG_QUALITY = 60


def original(name: PhotoName) -> Image.Image:
    """Return the photo in RGB, cropped so that both sides are multiples of 4."""
    with Image.open(_FILES[name]) as photo:
        width, height = (side - side % SHRINK for side in photo.size)
        return photo.convert("RGB").crop((0, 0, width, height))


def degrade(photo: Image.Image, seed: int = 0) -> Image.Image:
    """Return the photo at a quarter of its width and height, with noise and JPEG artefacts, like a
    scan."""
    small = photo.resize((photo.width // SHRINK, photo.height // SHRINK), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed).normal(0.0, NOISE_SIGMA, (small.height, small.width, 3))
    noisy = np.clip(_pixels(small) + noise, 0, 255).round().astype(np.uint8)
    return Image.open(BytesIO(jpeg(Image.fromarray(noisy)))).convert("RGB")


def jpeg(photo: Image.Image) -> bytes:
    file = BytesIO()
    photo.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def enlarge(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Enlarge bicubically, the baseline without a model."""
    return photo.resize(size, Image.Resampling.BICUBIC)


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Return the structural similarity of two pictures of one size; 1.0 means equal."""
    return float(
        structural_similarity(  # type: ignore[no-untyped-call]
            _pixels(a), _pixels(b), data_range=255, channel_axis=2
        )
    )


def _pixels(photo: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(photo.convert("RGB"))
