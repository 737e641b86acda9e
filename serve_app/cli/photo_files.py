"""Finds the photos among files and folders that a user named, and says what else is there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from restoration.batches import item_name
from restoration.errors import InvalidRequest
from restoration.images import sniff

_SNIFFED_BYTES = 4096
# A file that is named like a photo and is none is for the service to refuse, by its name.
_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp"),
        *(".heic", ".heif", ".avif"),
    }
)
_NAMED = 5  # of what was left out, for each reason


@dataclass(frozen=True, slots=True)
class PhotoFile:
    """`place` is the path below the folder that was named, or the name of a file that was."""

    path: Path
    place: PurePath


@dataclass(slots=True)
class FoundPhotos:
    """`left_out` has the places of all else, by the reason."""

    photos: list[PhotoFile] = field(default_factory=list)
    left_out: dict[str, list[PurePath]] = field(default_factory=dict)

    def leave_out(self, reason: str, place: PurePath) -> None:
        self.left_out.setdefault(reason, []).append(place)

    def left_out_lines(self) -> Iterator[str]:
        """A line for each reason, with the number and the first names."""
        for reason, places in self.left_out.items():
            names = ", ".join(item_name(str(place)) for place in places[:_NAMED])
            more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
            yield f"left out {len(places)}, {reason}: {names}{more}"


def find_photos(
    paths: Sequence[Path], *, recursive: bool = False, output: Path | None = None
) -> FoundPhotos:
    """Every file of `paths`, and what is a photo by its content in its folders, by name.

    Hidden files are left out, and so is the folder `output` inside of another.
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
    """Of a folder's entries the files first, then the folders, each by name."""
    try:
        entries = sorted(os.scandir(folder), key=lambda each: (_is_folder(each), each.name))
    except OSError as error:
        found.leave_out(f"cannot be read ({error.strerror})", place)
        return
    for entry in entries:
        path, below = Path(entry.path), place / entry.name
        if entry.name.startswith("."):  # those of AppleDouble (`._photo.jpg`) among them
            found.leave_out("hidden", below)
        elif not _is_folder(entry):
            _sort(path, below, found)
        elif entry.is_symlink():
            found.leave_out("links to folders", below)
        elif output is not None and output.exists() and output.samefile(path):
            found.leave_out("the folder for the results", below)
        elif recursive:
            _search(path, below, recursive, output, found)
        else:
            found.leave_out("folders, whose photos --recursive takes", below)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _sort(path: Path, place: PurePath, found: FoundPhotos) -> None:
    try:
        if not path.is_file():  # to open a pipe would wait for its other end
            reason = "no files" if path.exists() else "links that lead nowhere"
            return found.leave_out(reason, place)
        with path.open("rb") as file:
            sniff(file.read(_SNIFFED_BYTES))
    except OSError as error:
        return found.leave_out(f"cannot be read ({error.strerror})", place)
    except InvalidRequest:
        if place.suffix.lower() not in _SUFFIXES:
            return found.leave_out("not pictures of an accepted type", place)
    found.photos.append(PhotoFile(path, place))
