"""Folders stay small, the architecture page names them, and tests need no benchmark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("restoration", "workflows", "comfy_pool", "persistence", "actors", "serve_app")
FOLDERS = sorted(
    {module.parent for package in PACKAGES for module in (ROOT / package).rglob("*.py")}
)
MOST_MODULES = 20


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_has_at_most_twenty_modules(folder: Path) -> None:
    modules = [module for module in folder.glob("*.py") if module.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES


def test_the_architecture_page_names_every_folder_of_the_first_two_levels() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for folder in FOLDERS:
        parts = folder.relative_to(ROOT).parts
        if len(parts) <= 2:
            assert f"{parts[-1]}/" in page, folder


def test_only_tests_of_benchmarks_import_benchmarks() -> None:
    """`make check` sees the other direction: benchmarks import no test."""
    importing = {
        module.relative_to(ROOT / "tests").as_posix()
        for module in (ROOT / "tests").rglob("*.py")
        if re.search(r"^(from|import) benchmarks", module.read_text(), re.MULTILINE)
    }
    assert importing == {
        "integration/test_bare_client.py",
        "integration/test_simulation.py",
        "unit/test_bench_answers.py",
        "unit/test_bench_figures.py",
    }
