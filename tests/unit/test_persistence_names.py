"""Persistence's names: object keys, cursors, stream ids, connection strings."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import psycopg2.extensions
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.objects.keys import input_key, output_key
from persistence.postgres.cursors import Cursor
from persistence.postgres.database import Database, libpq_url
from persistence.redis.stream_codec import format_id, parse_id
from restoration.errors import InvalidRequest, InvalidSettings
from restoration.images import ImageType
from restoration.jobs import AttemptRef, OutputFormat

JOB = UUID("00000000-0000-4000-8000-000000000001")
MOMENTS = st.datetimes(min_value=datetime(1, 1, 2), timezones=st.just(UTC))


@pytest.mark.parametrize("image_type", ImageType)
def test_every_type_of_input_has_a_key(image_type: ImageType) -> None:
    """Keys hold the job's id, and neither end in a slash nor hold two in a row."""
    key = input_key(JOB, image_type)
    assert key.startswith(f"inputs/{JOB}.")
    assert "//" not in key


@pytest.mark.parametrize("output_format", OutputFormat)
def test_each_attempt_has_an_output_of_its_own(output_format: OutputFormat) -> None:
    """Two attempts at one job never write the same object."""
    keys = {output_key(AttemptRef(JOB, attempt), output_format) for attempt in (1, 2, 11)}
    assert len(keys) == 3
    assert all(key.startswith(f"outputs/{JOB}/") and "//" not in key for key in keys)


@given(created_at=MOMENTS, job_id=st.uuids())
def test_cursors_come_back_exactly(created_at: datetime, job_id: UUID) -> None:
    """A cursor keeps microseconds and id, and needs no quoting in a URL."""
    text = Cursor(created_at, job_id).encode()
    assert Cursor.decode(text) == Cursor(created_at, job_id)
    assert text.replace("-", "").replace("_", "").isalnum()


@given(text=st.text() | st.binary(max_size=60).map(lambda raw: raw.hex()))
def test_anything_else_is_no_cursor(text: str) -> None:
    """Any other text raises InvalidRequest and no other error."""
    with pytest.raises(InvalidRequest):
        Cursor.decode(text)


@given(position=st.integers(0, 39))
def test_a_cursor_with_a_changed_character_is_refused(position: int) -> None:
    """A cursor damaged in transit does not lead to another place."""
    text = Cursor(datetime(2026, 1, 1, tzinfo=UTC), JOB).encode()
    changed = "A" if text[position] != "A" else "B"
    with pytest.raises(InvalidRequest):
        Cursor.decode(text[:position] + changed + text[position + 1 :])


@given(id_=st.tuples(st.integers(0, 10**18), st.integers(0, 10**18)))
def test_stream_ids_come_back(id_: tuple[int, int]) -> None:
    """A client can send an id back unchanged."""
    assert parse_id(format_id(id_)) == id_


@pytest.mark.parametrize(
    "text", ["", "1", "1-", "-1", "1-x", " 1-1", "1-1-1", "²-1", "9" * 20 + "-0"]
)
def test_anything_else_is_no_stream_id(text: str) -> None:
    """An id that Redis would refuse is refused here, as the client's error."""
    with pytest.raises(InvalidRequest):
        parse_id(text)


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg2", "postgres"])
def test_libpq_understands_the_url(scheme: str) -> None:
    """Every usual spelling of the scheme leads to the same server, password and options."""
    dsn = libpq_url(f"{scheme}://app:p%40ss%2F@db.example.org:6432/jobs?sslmode=require")
    parsed = psycopg2.extensions.parse_dsn(dsn)
    assert parsed == {
        "user": "app",
        "password": "p@ss/",
        "host": "db.example.org",
        "port": "6432",
        "dbname": "jobs",
        "sslmode": "require",
    }


@pytest.mark.parametrize(
    "url", ["", "nonsense", "mysql://a:secret@b/c", "postgresql://a:b@c:port/d"]
)
def test_what_is_no_postgres_url_is_refused(url: str) -> None:
    """The mistake is reported where the settings are used, without the password."""
    with pytest.raises(InvalidSettings) as caught:
        Database(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("where", ["@a,b/d", "@/d?host=a,b", "@/d?host=a:1&host=b:2"])
def test_one_server_or_one_name_is_asked_for(where: str) -> None:
    """libpq's choice among one host only does not work where it must not block."""
    with pytest.raises(InvalidSettings, match="one host only"):
        Database(f"postgresql://u:p{where}")
