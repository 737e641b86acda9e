"""Stores for both processes: jobs in Postgres, objects in S3, and the broker."""

from __future__ import annotations

import os
from typing import Any

import boto3
import celery
import redis
from botocore.config import Config
from sqlalchemy import Engine, create_engine, text

from persistence.postgres.database import sqlalchemy_url

TASK = "restore"
BUCKET = os.environ["S3_BUCKET"]
CONNECTIONS = 16
TOLD_S = 60

_TABLE = """
CREATE TABLE IF NOT EXISTS usual_jobs (
    id          uuid PRIMARY KEY,
    status      text NOT NULL,
    params      json NOT NULL,
    input_key   text NOT NULL,
    sha256      text NOT NULL,
    output_key  text,
    created_at  timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz
)"""


def open_database() -> Engine:
    return create_engine(sqlalchemy_url(os.environ["DATABASE_URL"]), pool_size=CONNECTIONS)


def create_table(database: Engine) -> None:
    with database.begin() as connection:
        connection.execute(text(_TABLE))


def open_s3() -> Any:
    return boto3.client(
        "s3",
        endpoint_url=os.environ["S3_ENDPOINT_URL"],
        region_name="us-east-1",
        config=Config(
            s3={"addressing_style": "path"},
            max_pool_connections=CONNECTIONS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def open_broker() -> Any:
    """Return a Celery app whose workers take one task at a time; if one dies, another retries its
    task."""
    app = celery.Celery("usual", broker=os.environ["REDIS_URL"])
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=1,
        broker_pool_limit=CONNECTIONS,
    )
    return app


class Ends:
    """Announces ended jobs through Valkey, which saves polling Postgres."""

    def __init__(self) -> None:
        # no socket timeout, because each call limits its own waiting
        url = os.environ["REDIS_URL"]
        self._valkey = redis.Redis.from_url(url, max_connections=64, socket_timeout=None)

    def tell(self, job_id: str) -> None:
        with self._valkey.pipeline() as calls:
            calls.rpush(_end_of(job_id), "")
            calls.expire(_end_of(job_id), TOLD_S)
            calls.execute()

    def wait(self, job_id: str, timeout_s: float) -> None:
        """Wait until the job has ended. Each end wakes one caller, once."""
        self._valkey.blpop([_end_of(job_id)], timeout_s)


def _end_of(job_id: str) -> str:
    return f"usual:ended:{job_id}"


if __name__ == "__main__":
    create_table(open_database())
