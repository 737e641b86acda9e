"""Compare the time of a claim with a million waiting jobs and with a thousand."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Connection, create_engine, text

from benchmarks.figures import Bench, Figure, Goal
from persistence.embedded.local import LocalServices
from persistence.postgres.database import Database, sqlalchemy_url
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.migrate import upgrade
from restoration.queue_policy import QueuePolicy

FEW, MANY = 1_000, 1_000_000
OWNERS = 1_000
ROUNDS = 5
CLAIMS = 400
LEASE_S = 3600.0

# Jobs are submitted one a millisecond, in the order of their owners' numbers.
_FILL = text("""
    INSERT INTO jobs (id, owner, status, workflow, workflow_version, params, output_format,
        priority, input_key, input_sha256, input_size_bytes, input_content_type, created_at,
        max_attempts, queue_deadline_at)
    SELECT gen_random_uuid(), 'owner-' || (n % :owners), 'queued', 'restore', '1', '{}', 'png',
        10, 'inputs/x.png', repeat('0', 64), 1, 'image/png',
        now() - (:rows - n) * interval '1 ms', 3, now() + interval '1 day'
    FROM generate_series(1, :rows) AS n
""")


def claim_time(bench: Bench) -> Sequence[Figure]:
    """Measure in turns on two databases of one server, one for each number of jobs."""
    with tempfile.TemporaryDirectory(prefix="comfy-bench-", ignore_cleanup_errors=True) as folder:
        with LocalServices(Path(folder), only=["postgres"]) as services:
            url = services.urls.database_url
            few, many = (filled(url, name, rows, bench) for name, rows in _SIZES)
            samples = asyncio.run(_ratios(few, many))
    return [
        Figure(
            "claim time, 1,000,000 waiting jobs over 1,000",
            [many / few for few, many in samples],
            Goal(1.5, at_least=False),
            parts=f"{1e3 * statistics.median(many for _, many in samples):.2f} ms over "
            f"{1e3 * statistics.median(few for few, _ in samples):.2f} ms",
        )
    ]


_SIZES = (("few", FEW), ("many", MANY))


def filled(url: str, name: str, rows: int, bench: Bench) -> str:
    """Create a database with `rows` waiting jobs, and return its URL."""
    bench.say(f"filling a database with {rows:,} jobs of {OWNERS:,} owners")
    server = create_engine(sqlalchemy_url(url), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    server.dispose()
    filled = server.url.set(drivername="postgresql", database=name)
    filled_url = filled.render_as_string(hide_password=False)
    upgrade(filled_url)
    database = create_engine(sqlalchemy_url(filled_url), isolation_level="AUTOCOMMIT")
    with database.connect() as connection:
        _fill(connection, rows)
    database.dispose()
    return filled_url


def _fill(connection: Connection, rows: int) -> None:
    connection.execute(text("SET statement_timeout = 0"))
    connection.execute(_FILL, {"rows": rows, "owners": OWNERS})
    connection.execute(text("VACUUM ANALYZE jobs, turns"))


async def _ratios(few_url: str, many_url: str) -> list[tuple[float, float]]:
    """Return for each round the median claim time in seconds with few jobs and with many."""
    few, many = Database(few_url), Database(many_url)
    try:
        return [(await _median_claim_s(few), await _median_claim_s(many)) for _ in range(ROUNDS)]
    finally:
        await few.aclose()
        await many.aclose()


async def _median_claim_s(database: Database) -> float:
    """Return the median claim time. Each claim is handed back, so that every round finds equal
    queues."""
    store = PostgresJobStore(database, QueuePolicy())
    took_s = []
    for _ in range(CLAIMS):
        started = time.perf_counter()
        job = await store.claim("worker", LEASE_S, ["restore"])
        took_s.append(time.perf_counter() - started)
        assert job is not None
        await store.release(job.ref, None)
    return statistics.median(took_s)
