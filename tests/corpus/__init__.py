"""Every odd file that people send, and what comes back for it.

`python -m tests.corpus FOLDER` writes the files, for tests of other kinds, and prints the table
that is in `docs/inputs.md`.
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
    """A file of each kind in `docs/inputs.md`."""
    for kind in (jpegs, pngs, tiffs, others):
        yield from kind.documented()


def siblings() -> Iterator[Case]:
    """More files of those kinds: their other depths, layouts and damages."""
    for kind in (jpegs, pngs, tiffs, others):
        yield from kind.siblings()


def slug(case: Case) -> str:
    return re.sub(r"[^a-z0-9]+", "-", case.what.lower()).strip("-")


def difference(result: Image.Image, expected: Image.Image) -> int:
    """The largest of any channel in the middle of each quarter, at any size of the result.

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
    """The corpus in Markdown."""
    lines = ["| File | Answer | Result, or what the error names |", "|---|---|---|"]
    for case in corpus():
        answer = case.expected if isinstance(case.expected, Refused) else "202"
        lines.append(f"| {case.what} | {answer} | {case.comes_back} |")
    return "\n".join(lines)
