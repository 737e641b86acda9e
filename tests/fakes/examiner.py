"""The Examiner port without a process of its own, for tests of what stands on it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from actors.images.reader import ImageInfo, examine
from restoration.images import UploadLimits


@dataclass
class InProcess:
    limits: UploadLimits

    async def examine(self, data: bytes) -> ImageInfo:
        return await asyncio.to_thread(examine, data, self.limits)
