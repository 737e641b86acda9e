"""Readiness of the service's dependencies, probed at most once a second for all callers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Literal

import structlog

from restoration.errors import RestorationError
from restoration.tasks import stop

log = structlog.get_logger(__name__)

PING_TIMEOUT_S = 2.0
MIN_INTERVAL_S = 1.0

Verdict = Literal["ok", "error"]
Ping = Callable[[], Coroutine[Any, Any, None]]


class ReadinessProbe:
    """Pings dependencies for callers without a token, at most once in MIN_INTERVAL_S.

    Callers share the round of pings in progress, or the results of the last one.
    """

    def __init__(
        self, pings: Mapping[str, Ping], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pings = pings
        self._clock = clock
        self._began_at = float("-inf")
        self._round: asyncio.Task[dict[str, Verdict]] | None = None

    async def results(self) -> Mapping[str, Verdict]:
        """Return each dependency's verdict, by its name."""
        if self._round is None or (self._round.done() and self._is_due()):
            self._began_at = self._clock()
            self._round = asyncio.create_task(self._ask())
        # a caller that is cancelled must not cancel the round for the others
        return await asyncio.shield(self._round)

    async def aclose(self) -> None:
        if self._round is not None:
            await stop(self._round)

    def _is_due(self) -> bool:
        return self._clock() >= self._began_at + MIN_INTERVAL_S

    async def _ask(self) -> dict[str, Verdict]:
        verdicts = await asyncio.gather(*(_ask(name, ping) for name, ping in self._pings.items()))
        return dict(zip(self._pings, verdicts, strict=True))


async def _ask(name: str, ping: Ping) -> Verdict:
    try:
        async with asyncio.timeout(PING_TIMEOUT_S):
            await ping()
    except (RestorationError, TimeoutError) as error:
        log.warning("dependency_down", dependency=name, reason=repr(error))
        return "error"
    return "ok"
