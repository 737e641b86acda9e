"""Client preferences: Prefer (RFC 7240) for waiting, Accept (RFC 9110) for the type of response."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MAX_WAIT_S = 60
_WAIT = re.compile(r"wait\s*=\s*\"?(\d{1,9})\"?", re.IGNORECASE)
_RANGE = re.compile(
    r"(?P<range>[\w!#$&^.+*-]+/[\w!#$&^.+*-]+)\s*(?:;\s*q=(?P<weight>0(?:\.\d{0,3})?|1(?:\.0{0,3})?))?"
)


def preferred_wait_s(headers: Iterable[str]) -> int | None:
    """Return the seconds to wait, at most MAX_WAIT_S, or None without such a preference.

    Preferences are hints: a malformed one is ignored, and the first of several counts.
    """
    for header in headers:
        for preference in header.split(","):
            if found := _WAIT.fullmatch(preference.partition(";")[0].strip()):
                return min(int(found[1]), MAX_WAIT_S)
    return None


def prefers(media_type: str, than: str, accept: Iterable[str]) -> bool:
    """Return whether Accept prefers `media_type` to `than` (RFC 9110, section 12.5.1).

    Malformed ranges are ignored. Without a valid range neither type is preferred.
    """
    weights = {
        found["range"]: float(found["weight"] or 1)
        for header in accept
        for part in header.lower().split(",")
        if (found := _RANGE.fullmatch(part.strip()))
    }
    return _weight(media_type, weights) > _weight(than, weights)


def _weight(media_type: str, weights: Mapping[str, float]) -> float:
    """Return the weight of the most specific range that contains the type, or 0."""
    kind = media_type.partition("/")[0]
    for each in (media_type, f"{kind}/*", "*/*"):
        if each in weights:
            return weights[each]
    return 0
