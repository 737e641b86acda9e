"""Unusual files that people send, with the expected answer to each.

`python -m tests.corpus FOLDER` writes the files, for tests of other kinds, and prints the table in
`docs/inputs.md`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.corpus import jpegs, others, pngs, tiffs
from tests.corpus.scenes import Case, Refused

__all__ = ["Case", "Refused", "corpus", "difference", "siblings", "slug", "table"]


def corpus() -> Iterator[Case]:
    """Return a file of each kind in `docs/inputs.md`."""
    for kind in (jpegs, pngs, tiffs, others):
        yield from kind.documented()


def siblings() -> Iterator[Case]:
    """Return more files of those kinds, with other depths, layouts and damages."""
    for kind in (jpegs, pngs, tiffs, others):
        yield from kind.siblings()


def slug(case: Case) -> str:
    return re.sub(r"[^a-z0-9]+", "-", case.what.lower()).strip("-")


def difference(result: Image.Image, expected: Image.Image) -> int:
    """Return the largest difference of a channel in the middle of the four quarters, at any size.

    Where `expected` is transparent, only the alpha counts.
    """
    worst = 0
    for across, down in ((1, 1), (3, 1), (1, 3), (3, 3)):
        ours, theirs = (
            np.array(image.getpixel((across * image.width // 4, down * image.height // 4)), int)
            for image in (result, expected)
        )
        seen = slice(3, 4) if theirs[3:].tolist() == [0] else slice(None)
        worst = max(worst, int(np.abs(ours[seen] - theirs[seen]).max()))
    return worst


def table() -> str:
    """Return the corpus as a Markdown table."""
    lines = ["| File | Response | Result, or content of the error |", "|---|---|---|"]
    for case in corpus():
        answer = case.expected if isinstance(case.expected, Refused) else "202"
        lines.append(f"| {case.what} | {answer} | {case.comes_back} |")
    return "\n".join(lines)
