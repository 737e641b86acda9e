"""Webhooks: what is sent when a job has ended, how it is signed, and when it is tried again. Pure.

Scheme and headers are those of Standard Webhooks 1.0 (standardwebhooks.com), so that a receiver
can verify with a library off the shelf. Where a webhook may go is in `restoration.webhooks.urls`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from restoration.backoff import backoff_s
from restoration.jobs import Job

SECRET_PREFIX = "whsec_"  # noqa: S105 - the name of the format
_SECRET_BYTES = range(24, 65)


class DeliveryStatus(StrEnum):
    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Delivery:
    """How the webhook of an ended job stands. `next_try_at` is set while it is pending."""

    status: DeliveryStatus = DeliveryStatus.PENDING
    tries: int = 0
    last_error: str | None = None
    next_try_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class DueDelivery:
    """One try at a webhook: the `tries`-th, `age_s` after its job ended."""

    job: Job
    host: str
    tries: int
    age_s: float


@dataclass(frozen=True, slots=True)
class RetrySchedule:
    """Doubling delays with jitter, in seconds, until `give_up_s` after the job's end."""

    first_s: float = 5.0
    longest_s: float = 3600.0
    give_up_s: float = 24 * 3600.0

    def delay_s(self, tries: int, age_s: float, asked_s: float = 0) -> float | None:
        """How long to wait after the `tries`-th failure; None: it was the last.

        `asked_s` is what the receiver asked for. The last try comes when the time is up.
        """
        if age_s >= self.give_up_s:
            return None
        own_s = backoff_s(self.first_s, self.longest_s, tries - 1)
        wanted = max(own_s, min(asked_s, self.longest_s))
        return min(wanted, self.give_up_s - age_s)


def message_id(job_id: UUID) -> str:
    """The same for every try, for a receiver to tell a repetition: a job ends once."""
    return f"msg_{job_id.hex}"


def payload(job: Job) -> bytes:
    """The JSON that is sent for a job that has ended; `links` are paths on the API's host."""
    if job.finished_at is None:
        raise ValueError(f"job {job.id} has not ended")
    path = f"/api/v1/restorations/{job.id}"
    failure = job.failure
    event = {
        "type": f"restoration.{job.status}",
        "timestamp": job.finished_at.isoformat().replace("+00:00", "Z"),
        "data": {
            "id": str(job.id),
            "status": job.status,
            "failure": failure and {"code": failure.code, "message": failure.message},
            "links": {"self": path, "result": f"{path}/result"},
        },
    }
    return json.dumps(event, separators=(",", ":")).encode()


def secret_key(secret: str) -> bytes:
    """The bytes of a `whsec_` secret. Raises ValueError for what is none."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith(SECRET_PREFIX) or len(key) not in _SECRET_BYTES:
        raise ValueError(
            f"must be {SECRET_PREFIX} followed by 24 to 64 random bytes in base64: "
            f'echo "{SECRET_PREFIX}$(openssl rand -base64 32)"'
        )
    return key


def signed_headers(key: bytes, message: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """The headers by which a receiver knows that `body` is ours, and fresh."""
    content = f"{message}.{timestamp_s}.".encode() + body
    signature = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
    return {
        "webhook-id": message,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": f"v1,{signature}",
    }
