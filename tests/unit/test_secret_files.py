"""Point 8: secrets from files, as container platforms mount them."""

from __future__ import annotations

from pathlib import Path

import pytest

from restoration.errors import InvalidSettings
from restoration.settings import load_settings
from tests.fakes.receiver import SECRET

MINIMAL = {"DATABASE_URL": "postgresql://d", "REDIS_URL": "redis://r", "S3_BUCKET": "b"}


@pytest.mark.secrets
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "postgresql://u:hunter2@d/x"),
        ("REDIS_URL", "rediss://:hunter2@r"),
        ("AWS_SECRET_ACCESS_KEY", "hunter2"),
        ("WEBHOOK_SECRET", SECRET),
    ],
)
def test_a_secret_may_be_in_a_file(tmp_path: Path, name: str, value: str) -> None:
    """The settings equal those from the variable itself, without the line's end."""
    file = tmp_path / "secret"
    file.write_text(value + "\n")
    others = {key: other for key, other in MINIMAL.items() if key != name}
    from_file = load_settings({**others, f"{name}_FILE": str(file)})
    assert from_file == load_settings({**others, name: value})
    assert "hunter2" not in repr(from_file)


@pytest.mark.secrets
def test_two_sources_of_a_secret_are_refused(tmp_path: Path) -> None:
    """The service does not guess which of them was meant."""
    with pytest.raises(InvalidSettings, match="DATABASE_URL and DATABASE_URL_FILE are both set"):
        load_settings({**MINIMAL, "DATABASE_URL_FILE": str(tmp_path / "x")})


@pytest.mark.secrets
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """The message names the file and the variable, without a traceback."""
    others = {key: value for key, value in MINIMAL.items() if key != "REDIS_URL"}
    with pytest.raises(InvalidSettings, match=r"REDIS_URL_FILE: cannot read .*nothing"):
        load_settings({**others, "REDIS_URL_FILE": str(tmp_path / "nothing")})


@pytest.mark.secrets
def test_only_secrets_come_from_files(tmp_path: Path) -> None:
    """S3_BUCKET_FILE is not a setting."""
    with pytest.raises(InvalidSettings, match="S3_BUCKET"):
        load_settings({"DATABASE_URL": "d", "REDIS_URL": "r", "S3_BUCKET_FILE": str(tmp_path)})
