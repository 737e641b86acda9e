"""The clocks of one run: when to look at it, when to stop it, when to give its engine up."""

from __future__ import annotations

import time

from comfy_pool.limits import EngineLimits


class Patience:
    """`deaf` is a run whose events cannot arrive: its silence says nothing, and is no stall."""

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

    def sign_of_life(self) -> None:
        """The run goes on, or has no need to: it waits for its turn."""
        self._sign_at = time.monotonic()

    def answered(self) -> None:
        """The engine did, whatever it said."""
        self._answered_at = time.monotonic()

    def look_after_s(self, *, deaf: bool) -> float:
        """How long the run may be left to its events."""
        if self.stop_asked or self.stalled:
            return self._limits.stop_poll_s
        if deaf:
            return self._limits.blind_poll_s
        return max(0.0, min(self._limits.poll_s, self._limits.stall_s - self._silent_s()))

    def check_stall(self, *, deaf: bool) -> None:
        if not self.stalled and not deaf and self._silent_s() >= self._limits.stall_s:
            self._stalled_at = time.monotonic()

    def end(self, no_answer: str) -> str | None:
        """Why the engine is to be given up, if it is; `no_answer` if there was none just now."""
        now, limits = time.monotonic(), self._limits
        if no_answer and now - self._answered_at > limits.unreachable_s:
            return f"the engine hangs: {no_answer}"
        if self._stalled_at is not None and now - self._stalled_at > limits.stall_stop_s:
            return f"the engine was silent for {limits.stall_s:g} s and cannot be interrupted"
        if self._asked_at is not None and now - self._asked_at > limits.stop_s:
            return f"the run did not stop within {limits.stop_s:g} s"
        return None

    def _silent_s(self) -> float:
        return time.monotonic() - self._sign_at
