"""Write the files of the corpus to a folder, and print its table."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.corpus import corpus, siblings, slug, table


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for case in (*corpus(), *siblings()):
        (folder / f"{slug(case)}{Path(case.name).suffix}").write_bytes(case.data)
    sys.stdout.write(table() + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
