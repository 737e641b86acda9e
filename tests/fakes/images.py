"""The work of the image processes, done in this process for tests of code that depends on it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actors.images.encode import encode, engine_input
from actors.images.process_pool import PreparedImage
from actors.images.reader import ImageInfo, examine, read
from restoration.engine_port import EngineResult, Pixels
from restoration.images import UploadLimits
from restoration.jobs import OutputFormat


@dataclass
class ImagesHere:
    """Implements `Examiner` and `Images`; uploads are read within `limits`."""

    limits: UploadLimits = field(default_factory=UploadLimits)

    async def examine(self, data: bytes) -> ImageInfo:
        return await asyncio.to_thread(examine, data, self.limits)

    async def prepare(
        self, data: bytes, *, keep_metadata: bool = False, on_white: bool = False
    ) -> PreparedImage:
        image = await asyncio.to_thread(read, data, self.limits, keep_metadata=keep_metadata)
        file, alpha = engine_input(image, on_white=on_white)
        kept = None if alpha is None else alpha.tobytes()
        return PreparedImage(file, image.info, image.is_grey, kept, image.exif)

    async def encode(
        self,
        picture: EngineResult,
        output_format: OutputFormat,
        quality: int,
        photo: PreparedImage,
        *,
        grey: bool,
    ) -> bytes:
        source = pixels_of(picture) if isinstance(picture, Pixels) else picture
        alpha = None
        if photo.alpha is not None:
            alpha = np.frombuffer(photo.alpha, np.uint8).reshape(photo.info.height, -1)
        return await asyncio.to_thread(
            encode, source, output_format, quality, alpha, photo.exif, grey=grey
        )


def pixels_of(picture: Pixels) -> NDArray[np.uint8]:
    """Return the handed-over pixels in the shape (height, width, channels)."""
    shape = (picture.height, picture.width, picture.channels)
    return np.memmap(picture.path, np.uint8, "r", shape=shape)
