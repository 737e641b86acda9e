""".env.example, compared with the settings that the code reads."""

from __future__ import annotations

import re

import pytest

from restoration.settings import Settings, load_settings
from tests.support.cluster_files import ROOT

# A comment, then the variable, which is behind `#` if it is optional.
VARIABLE = re.compile(r"^# (.+)\n(#?)([A-Z][A-Z0-9_]*)=(.*)$", re.MULTILINE)


@pytest.fixture
def example() -> str:
    return (ROOT / ".env.example").read_text()


def test_every_setting_is_in_the_example(example: str) -> None:
    """.env.example has each setting once, with a comment above, and otherwise only Ray's
    variables."""
    names = [name for _, _, name, _ in VARIABLE.findall(example)]

    assert names == re.findall(r"^#?([A-Z][A-Z0-9_]*)=", example, re.MULTILINE)
    assert len(names) == len(set(names))
    ours = {name for name in names if not name.startswith("RAY_")}
    assert ours == {field.alias for field in Settings.model_fields.values()}


def test_the_example_shows_the_defaults(example: str) -> None:
    """The values behind `#`, except those marked with e.g., are the defaults."""
    found = VARIABLE.findall(example)
    required = {name: value for _, off, name, value in found if not off}
    defaults = {name: value for text, off, name, value in found if off and "(e.g." not in text}
    needed = {field.alias: field.is_required() for field in Settings.model_fields.values()}

    assert set(required) == {name for name, is_needed in needed.items() if is_needed}
    assert load_settings(required | defaults) == load_settings(required)
    assert len(defaults) >= 10
