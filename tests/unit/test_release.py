"""A release's parts agree with the version in pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
WHEEL = re.compile(r"comfy_restore-([0-9][^-]*)-py3-none-any\.whl")
IMAGE = re.compile(r"comfy-restore(?:-gpu)?:([0-9][\w.]*)")


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("cluster.yaml", WHEEL),
        ("docs/operations.md", WHEEL),
        ("docs/operations.md", IMAGE),
    ],
)
def test_a_file_that_names_the_release_names_this_version(
    file: str, pattern: re.Pattern[str]
) -> None:
    assert set(pattern.findall((ROOT / file).read_text())) == {VERSION}


def test_the_changelog_begins_with_what_is_unreleased() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert all(
        re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", each) for each in headings[1:]
    )


@pytest.mark.parametrize(
    "package", PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
)
def test_a_package_says_that_it_has_types(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
