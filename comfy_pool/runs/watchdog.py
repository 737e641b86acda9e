"""Decide when to poll a run, when to interrupt it and when to give its engine up."""

from __future__ import annotations

import time

from comfy_pool.limits import EngineLimits


class Watchdog:
    """Watchdog of one run, with the time limits of `EngineLimits`.

    `no_events` means that the run's events cannot arrive, so that silence is not a stall.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._asked_at: float | None = None
        self._stalled_at: float | None = None
        self._sign_at = self._answered_at = time.monotonic()

    @property
    def stop_asked(self) -> bool:
        return self._asked_at is not None

    @property
    def stalled(self) -> bool:
        return self._stalled_at is not None

    def ask_to_stop(self) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()

    def progressed(self) -> None:
        """Record that the run makes progress, or waits behind another run."""
        self._sign_at = time.monotonic()

    def answered(self) -> None:
        """Record that the engine answered a request."""
        self._answered_at = time.monotonic()

    def poll_after_s(self, *, no_events: bool) -> float:
        """Return the seconds until the next poll, if no event triggers it before."""
        if self.stop_asked or self.stalled:
            return self._limits.stop_poll_s
        if no_events:
            return self._limits.blind_poll_s
        return max(0.0, min(self._limits.poll_s, self._limits.stall_s - self._silent_s()))

    def check_stall(self, *, no_events: bool) -> None:
        """Mark the run as stalled if it gave no sign of life for `stall_s` seconds."""
        if not self.stalled and not no_events and self._silent_s() >= self._limits.stall_s:
            self._stalled_at = time.monotonic()

    def reason_to_give_up(self, no_answer: str) -> str | None:
        """Return None unless the engine hangs. `no_answer`: the last request's error, if any."""
        now, limits = time.monotonic(), self._limits
        if no_answer and now - self._answered_at > limits.unreachable_s:
            return f"the engine does not respond: {no_answer}"
        if self._stalled_at is not None and now - self._stalled_at > limits.stall_stop_s:
            return f"the engine sent no message for {limits.stall_s:g} s and cannot be interrupted"
        if self._asked_at is not None and now - self._asked_at > limits.stop_s:
            return f"the run did not stop within {limits.stop_s:g} s"
        return None

    def _silent_s(self) -> float:
        return time.monotonic() - self._sign_at
