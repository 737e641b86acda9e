"""Photos are found in a folder by content, and the other files are reported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve_app.cli.photo_files import FoundPhotos, find_photos
from tests.fakes.site import photo

APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "


def write(folder: Path, *names: str, data: bytes = b"") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data or photo())


def places(found: FoundPhotos) -> list[str]:
    return [str(photo.place) for photo in found.photos]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.JPG", "a.bin", "a", "a.txt"])
def test_a_photo_is_known_by_its_content(tmp_path: Path, kind: str, name: str) -> None:
    write(tmp_path, name, data=photo(format=kind))
    assert places(find_photos([tmp_path])) == [name]


def test_a_file_that_is_only_named_like_a_photo_is_for_the_service_to_refuse(
    tmp_path: Path,
) -> None:
    """So a broken photo is not skipped silently."""
    write(tmp_path, "a.png", "b.HEIC", data=b"broken")
    assert places(find_photos([tmp_path])) == ["a.png", "b.HEIC"]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, ".a.jpg", ".thumbnails/a.jpg", "b/.c/d.jpg", "e.jpg")
    write(tmp_path, "._e.jpg", data=APPLE_DOUBLE)
    found = find_photos([tmp_path], recursive=True)
    assert places(found) == ["e.jpg"]
    assert list(found.left_out_lines()) == ["skipped 4, hidden: ._e.jpg, .a.jpg, .thumbnails, b/.c"]


def test_folders_in_folders_are_taken_when_asked_for(tmp_path: Path) -> None:
    """Files come before folders, each sorted by name."""
    write(tmp_path, "z.jpg", "a/1.jpg", "a/b/1.jpg", "c/1.jpg")
    assert places(find_photos([tmp_path])) == ["z.jpg"]
    found = find_photos([tmp_path], recursive=True)
    assert places(found) == ["z.jpg", "a/1.jpg", "a/b/1.jpg", "c/1.jpg"]
    assert [each.path for each in found.photos] == [tmp_path / place for place in places(found)]


def test_results_of_an_earlier_time_are_no_photos(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "restored/a.png")
    found = find_photos([tmp_path], recursive=True, output=tmp_path / "restored")
    assert places(found) == ["a.jpg"]
    assert "the folder for the results: restored" in " ".join(found.left_out_lines())
    assert places(find_photos([tmp_path], output=tmp_path)) == ["a.jpg"]


def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    """A pipe is not opened, which would block forever; a link to a folder may be a cycle."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    write(tmp_path, "b.jpg")
    (tmp_path / "linked.jpg").symlink_to(tmp_path / "b.jpg")
    found = find_photos([tmp_path], recursive=True)
    assert places(found) == ["b.jpg", "linked.jpg"]
    assert sorted(str(place) for group in found.left_out.values() for place in group) == [
        "circle",
        "gone.jpg",
        "itself.jpg",
        "pipe.jpg",
    ]


def test_of_many_files_the_first_are_named(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number:02}.txt" for number in range(12)), data=b"?")
    [line] = find_photos([tmp_path]).left_out_lines()
    assert line == (
        "skipped 12, not images of a supported type: "
        "00.txt, 01.txt, 02.txt, 03.txt, 04.txt and 7 more"
    )


def test_a_name_cannot_write_over_the_terminal(tmp_path: Path) -> None:
    write(tmp_path, "a\x1b[2J\n.txt", data=b"?")
    [line] = find_photos([tmp_path]).left_out_lines()
    assert line.isprintable()


def test_a_file_that_was_named_is_taken_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, ".hidden.txt", data=b"?")
    assert places(find_photos([tmp_path / ".hidden.txt"])) == [".hidden.txt"]
