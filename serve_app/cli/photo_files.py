"""Find the photos among the files and folders that a user named, and report what was left out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from restoration.batches import item_name
from restoration.errors import InvalidRequest
from restoration.images import sniff

_SNIFFED_BYTES = 4096
# A file with one of these suffixes but other content is still submitted, so that the service
# reports it by name.
_SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp .heic .heif .avif".split())
_NAMED = 5  # names listed for each reason


@dataclass(frozen=True, slots=True)
class PhotoFile:
    """A photo. `place` is its path below the named folder, or the name of a file named itself."""

    path: Path
    place: PurePath


@dataclass(slots=True)
class FoundPhotos:
    """The photos found. `left_out` maps a reason to the places of other entries."""

    photos: list[PhotoFile] = field(default_factory=list)
    left_out: dict[str, list[PurePath]] = field(default_factory=dict)

    def leave_out(self, reason: str, place: PurePath) -> None:
        self.left_out.setdefault(reason, []).append(place)

    def left_out_lines(self) -> Iterator[str]:
        """Yield a line for each reason, with the number of entries and the first names."""
        for reason, places in self.left_out.items():
            names = ", ".join(item_name(str(place)) for place in places[:_NAMED])
            more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
            yield f"skipped {len(places)}, {reason}: {names}{more}"


def find_photos(
    paths: Sequence[Path], *, recursive: bool = False, output: Path | None = None
) -> FoundPhotos:
    """Return every file of `paths`, and the photos in its folders, sorted by name.

    In folders a photo is a file with the content or the suffix of one. Hidden files are left out,
    and so is the folder `output` within another.
    """
    found = FoundPhotos()
    for path in paths:
        if path.is_dir():
            _search(path, PurePath(), recursive, output, found)
        else:
            found.photos.append(PhotoFile(path, PurePath(path.name)))
    return found


def _search(
    folder: Path, place: PurePath, recursive: bool, output: Path | None, found: FoundPhotos
) -> None:
    """Add a folder's files first, then those of its folders, each sorted by name."""
    try:
        entries = sorted(os.scandir(folder), key=lambda each: (_is_folder(each), each.name))
    except OSError as error:
        found.leave_out(f"cannot be read ({error.strerror})", place)
        return
    for entry in entries:
        path, below = Path(entry.path), place / entry.name
        if entry.name.startswith("."):  # AppleDouble files (`._photo.jpg`) are hidden too
            found.leave_out("hidden", below)
        elif not _is_folder(entry):
            _add_if_photo(path, below, found)
        elif entry.is_symlink():
            found.leave_out("links to folders", below)
        elif output is not None and output.exists() and output.samefile(path):
            found.leave_out("the folder for the results", below)
        elif recursive:
            _search(path, below, recursive, output, found)
        else:
            found.leave_out("subfolders, which need --recursive", below)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _add_if_photo(path: Path, place: PurePath, found: FoundPhotos) -> None:
    try:
        if not path.is_file():  # opening a pipe would wait for its other end
            reason = "not regular files" if path.exists() else "broken links"
            return found.leave_out(reason, place)
        with path.open("rb") as file:
            sniff(file.read(_SNIFFED_BYTES))
    except OSError as error:
        return found.leave_out(f"cannot be read ({error.strerror})", place)
    except InvalidRequest:
        if place.suffix.lower() not in _SUFFIXES:
            return found.leave_out("not images of a supported type", place)
    found.photos.append(PhotoFile(path, place))
