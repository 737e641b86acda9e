"""An engine from one start to its end, as its runs share it; and which run its end speaks against.

ComfyUI runs one prompt after the other, in the order they came. When it dies or hangs, one run is
held responsible: the one that ran, or, if events came too late to tell, the first in line. The
others have lost nothing but time, and their error says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from comfy_pool.process.hosts import EngineHost
from comfy_pool.protocol.client import ComfyClient
from comfy_pool.protocol.websocket import EventSocket
from restoration.errors import EngineCrashed, EngineError, EngineStalled, EngineUnavailable

log = structlog.get_logger(__name__)


class EngineSession:
    """What a run needs of the engine it is in; `ended` tells how that engine's process ended."""

    def __init__(
        self,
        client: ComfyClient,
        host: EngineHost,
        ended: asyncio.Future[str],
        connect: Callable[[], Awaitable[EventSocket]],
    ) -> None:
        self.client = client
        self.host = host
        self.ended = ended
        self.connect = connect
        self._line: list[str] = []  # the run that executes, those that wait, those that are over
        self._hung = ""
        self._culprit: str | None = None
        self._judged = False

    @property
    def alive(self) -> bool:
        """Neither ended nor given up."""
        return not self.ended.done() and not self._hung

    def submitted(self, run_id: str) -> None:
        self._line.append(run_id)

    def began(self, run_id: str) -> None:
        if run_id in self._line:
            self._line.remove(run_id)
            self._line.insert(0, run_id)

    def executed(self, run_id: str) -> None:
        """It is over in the engine, though its picture may still be there."""
        if run_id in self._line:
            self._line.remove(run_id)
            self._line.append(run_id)

    def left(self, run_id: str) -> None:
        if run_id in self._line:
            self._line.remove(run_id)

    async def give_up(self, reason: str) -> None:
        """Declare the engine hung, and end it if it is ours: the next run starts it anew."""
        if not self.alive:
            return
        self._hung = reason
        self._judge()
        log.error("engine_given_up", reason=reason, run=self._culprit)
        await self.host.stop()

    def end_for(self, run_id: str) -> EngineError:
        """What the end of this engine means for a run that was in it."""
        self._judge()
        how = self._hung or f"the engine {self.ended.result()}"
        if run_id != self._culprit:
            return EngineUnavailable(f"{how}; it was not this run's turn")
        return EngineStalled(how) if self._hung else EngineCrashed(how)

    def _judge(self) -> None:
        """Once, at the first news of the end: runs leave as they hear of it."""
        if not self._judged:
            self._culprit = self._line[0] if self._line else None
            self._judged = True
