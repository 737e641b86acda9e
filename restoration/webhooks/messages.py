"""Payload, signature and retry schedule of the webhook for an ended job. No I/O.

The signature scheme and headers are those of Standard Webhooks 1.0 (standardwebhooks.com), so that
receivers can verify with an existing library. `restoration.webhooks.urls` checks destinations.
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
    """State of an ended job's webhook. `next_try_at` is set while it is pending."""

    status: DeliveryStatus = DeliveryStatus.PENDING
    tries: int = 0
    last_error: str | None = None
    next_try_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class DueDelivery:
    """A webhook to send now: its `tries`-th try, `age_s` seconds after its job ended."""

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
        """Return the delay after the `tries`-th failed try, or None if it was the last.

        `age_s` is the time since the job's end, `asked_s` the receiver's Retry-After. The last try
        is made at `give_up_s`.
        """
        if age_s >= self.give_up_s:
            return None
        own_s = backoff_s(self.first_s, self.longest_s, tries - 1)
        wanted = max(own_s, min(asked_s, self.longest_s))
        return min(wanted, self.give_up_s - age_s)


def message_id(job_id: UUID) -> str:
    """Return the message id, the same for every try, by which receivers detect repetitions."""
    return f"msg_{job_id.hex}"


def payload(job: Job) -> bytes:
    """Return the JSON body for an ended job; its `links` are paths on the API's host.

    Raises ValueError if the job has not ended.
    """
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
    """Return the key in a `whsec_` secret, 24 to 64 bytes. Raises ValueError if it is malformed."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith(SECRET_PREFIX) or len(key) not in _SECRET_BYTES:
        raise ValueError(
            f"must be {SECRET_PREFIX} followed by 24 to 64 random bytes in base64; `echo "
            f'"{SECRET_PREFIX}$(openssl rand -base64 32)"` prints one'
        )
    return key


def signed_headers(key: bytes, message: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """Return the Standard Webhooks headers, with which a receiver verifies origin and age."""
    content = f"{message}.{timestamp_s}.".encode() + body
    signature = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
    return {
        "webhook-id": message,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": f"v1,{signature}",
    }
