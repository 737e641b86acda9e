"""State that runs share from an engine's start to its end, and blame for that end.

ComfyUI executes prompts one at a time, in the order of submission. If it dies or hangs, one run is
blamed: the executing one, or the first in line if events arrived too late. The other runs get
EngineUnavailable, which does not count against them.
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
    """One start of an engine, shared by its runs.

    `ended` resolves to a description of the process's end.
    """

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
        # Run ids: the executing run, then those that wait, then those that are over.
        self._order: list[str] = []
        self._hung = ""
        self._blamed: str | None = None
        self._decided = False

    @property
    def alive(self) -> bool:
        """Return whether the engine has neither ended nor been given up."""
        return not self.ended.done() and not self._hung

    def submitted(self, run_id: str) -> None:
        self._order.append(run_id)

    def began(self, run_id: str) -> None:
        if run_id in self._order:
            self._order.remove(run_id)
            self._order.insert(0, run_id)

    def executed(self, run_id: str) -> None:
        """Record that the engine has finished the run; its files may still be there."""
        if run_id in self._order:
            self._order.remove(run_id)
            self._order.append(run_id)

    def left(self, run_id: str) -> None:
        if run_id in self._order:
            self._order.remove(run_id)

    async def give_up(self, reason: str) -> None:
        """Declare the engine hung, and stop it if it is owned. The next run restarts it."""
        if not self.alive:
            return
        self._hung = reason
        self._blame()
        log.error("engine_given_up", reason=reason, run=self._blamed)
        await self.host.stop()

    def end_for(self, run_id: str) -> EngineError:
        """Return the error that the end of this engine means for a run.

        The blamed run gets EngineStalled after a hang, EngineCrashed after a crash; any other run
        gets EngineUnavailable.
        """
        self._blame()
        how = self._hung or f"the engine {self.ended.result()}"
        if run_id != self._blamed:
            return EngineUnavailable(f"{how}; another run was executing")
        return EngineStalled(how) if self._hung else EngineCrashed(how)

    def _blame(self) -> None:
        """Choose the blamed run, once: runs leave the line after the first report of the end."""
        if not self._decided:
            self._blamed = self._order[0] if self._order else None
            self._decided = True
