"""The Prefer header (RFC 7240): how long a client would rather wait for its result."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_WAIT_S = 60
_WAIT = re.compile(r"wait\s*=\s*\"?(\d{1,9})\"?", re.IGNORECASE)


def preferred_wait_s(headers: Iterable[str]) -> int | None:
    """Seconds to wait, at most MAX_WAIT_S; None when nothing (that we understand) is preferred.

    Preferences are hints: one that is malformed is ignored, and the first of two counts.
    """
    for header in headers:
        for preference in header.split(","):
            if found := _WAIT.fullmatch(preference.partition(";")[0].strip()):
                return min(int(found[1]), MAX_WAIT_S)
    return None
