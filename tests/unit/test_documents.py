"""The project's pages: their links resolve, and decisions have their form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("", "docs", "docs/decisions", ".github")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
LINK = re.compile(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)")
FORM = re.compile(
    r"# (?P<number>\d+)\. [A-Z][^\n]+\n\n"
    r"- Status: (?:accepted|amended by|superseded by)[^\n]*\n"
    r"- Date: \d{4}-\d{2}-\d{2}\n"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    links = LINK.findall(page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda decision: decision.name)
def test_a_decision_has_a_number_a_title_a_status_and_a_date(decision: Path) -> None:
    form = FORM.match(decision.read_text())
    assert form is not None
    assert int(form["number"]) == int(decision.name[:4])


def test_numbers_of_decisions_are_used_once() -> None:
    numbers = [decision.name[:4] for decision in DECISIONS]
    assert len(numbers) == len(set(numbers))
