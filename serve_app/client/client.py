"""The Python client of the HTTP API: blocking, typed, and safe to retry.

Temporary failures (no connection, 429, 502, 503, 504) are retried until `patience_s` has passed. A
submission carries an idempotency key, so that a retry cannot create a second job. Every failure is
an ApiError. The final state comes from polling; events only make it known sooner.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import httpx
from pydantic import ValidationError

from restoration.events import JobEvent, Progressed, StateChanged, from_json, is_last
from restoration.images import sniff
from restoration.jobs import JobStatus
from serve_app.client.batches import BatchCalls
from serve_app.client.errors import ApiError, error_of, parse
from serve_app.client.submissions import API, SubmissionCalls, read
from serve_app.client.workers import WorkerCalls
from serve_app.schemas.restorations import (
    Restoration,
    RestorationPage,
    UploadView,
    UsageReport,
    WorkflowList,
    WorkflowView,
)
from serve_app.sse import MEDIA_TYPE, Decoder

__all__ = ["API", "ApiError", "RestorationClient"]

POLL_S = 1.0
_TRY_AGAIN = frozenset({429, 502, 503, 504})
_FIRST_DELAY_S = 0.2
_MAX_DELAY_S = 5.0
# Longer than the server's heartbeat interval: a longer silence means a dead connection.
_SILENCE_S = 45.0
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class RestorationClient(SubmissionCalls, BatchCalls, WorkerCalls):
    """A client of one service, with one token. Close it, or use it as a context manager."""

    def __init__(self, base_url: str, token: str, *, patience_s: float = 30.0) -> None:
        self._patience_s = patience_s
        self._http = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(30.0, connect=5.0),
            # a service on this machine must not be reached through a proxy named by the environment
            trust_env=httpx.URL(base_url).host not in _LOOPBACK,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def upload(self, photo: Path | bytes) -> UUID:
        """Send a photo straight to the object store, and return the upload's id for `submit`."""
        data = read(photo)
        asked = {
            "content_type": sniff(data).value,
            "size_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        upload = parse(UploadView, self._call("POST", "/api/v1/uploads", json=asked))
        with self._without_token() as bare:
            self._persist(bare, upload.method, upload.url, content=data, headers=upload.headers)
        return upload.id

    def get(self, job_id: UUID | str) -> Restoration:
        """Return the job as it is now. Raises ApiError."""
        return parse(Restoration, self._call("GET", f"{API}/{job_id}"))

    def list(self, *statuses: JobStatus, limit: int = 50) -> Iterator[Restoration]:
        """Yield all jobs, newest first, fetching a page of `limit` at a time.

        With `statuses`, only jobs in one of these.
        """
        query = {"limit": limit, "status": [status.value for status in statuses]}
        page = parse(RestorationPage, self._call("GET", API, params=query))
        yield from page.restorations
        while page.next is not None:
            page = parse(RestorationPage, self._call("GET", page.next))
            yield from page.restorations

    def cancel(self, job_id: UUID | str) -> Restoration:
        """Ask for the job to be cancelled, and return it. A running job ends later."""
        return parse(Restoration, self._call("POST", f"{API}/{job_id}/cancel"))

    def retry(self, job_id: UUID | str) -> Restoration:
        """Submit a failed or cancelled job again, and return the new job."""
        return parse(Restoration, self._call("POST", f"{API}/{job_id}/retry"))

    def workflows(self) -> tuple[WorkflowView, ...]:
        """Return the workflows that the service offers, each with its parameters' JSON Schema."""
        return parse(WorkflowList, self._call("GET", "/api/v1/workflows")).workflows

    def usage(self, since: datetime) -> UsageReport:
        """Return the usage since then, of the token's owner or, with the scope `admin`, of all."""
        query = {"since": since.isoformat()}
        return parse(UsageReport, self._call("GET", "/api/v1/usage", params=query))

    def wait(self, job_id: UUID | str) -> Restoration:
        """Wait until the job has ended, and return it."""
        for _ in self.events(job_id):
            pass
        return self.get(job_id)

    def events(self, job_id: UUID | str) -> Iterator[JobEvent]:
        """Yield the job's events; the last one is always its final state.

        When the stream is cut or unavailable, the job itself is polled, and the stream is resumed
        after the last event that arrived.
        """
        decoder = Decoder()
        while True:
            decoder = Decoder(decoder.last_id)
            # `get` raises if the failure is not temporary
            with suppress(httpx.TransportError, ApiError):
                for text in self._stream(f"{API}/{job_id}/events", decoder):
                    try:
                        event = from_json(text)
                    except ValidationError:  # of a kind that this version does not know
                        continue
                    yield event
                    if is_last(event):
                        return
            job = self.get(job_id)
            yield StateChanged(job.status, job.attempt)
            if job.status.is_final:
                return
            if job.progress is not None:
                yield Progressed(job.progress.fraction, job.progress.stage, job.progress.attempt)
            time.sleep(POLL_S)  # ends with the job; `get` raises if the service stays unreachable

    def _stream(self, path: str, decoder: Decoder) -> Iterator[str]:
        """Yield the data of each event until the stream ends or breaks."""
        headers = {"Accept": MEDIA_TYPE}
        if decoder.last_id is not None:
            headers["Last-Event-ID"] = decoder.last_id
        timeout = httpx.Timeout(_SILENCE_S, connect=5.0)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as answer:
            if answer.is_error:
                answer.read()
                raise error_of(answer)
            for text in answer.iter_text():
                for event in decoder.feed(text):
                    yield event.data

    def _fetch(self, url: str) -> httpx.Response:
        with self._without_token() as bare:
            return self._persist(bare, "GET", url)

    def _without_token(self) -> httpx.Client:
        """Return a client for signed URLs: the object store must not see the token."""
        return httpx.Client(timeout=self._http.timeout, trust_env=self._http.trust_env)

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._persist(self._http, method, path, **options)

    def _persist(self, http: httpx.Client, method: str, url: str, **options: Any) -> httpx.Response:
        """Send a request, and retry temporary failures for `patience_s` after the first one.

        Raises ApiError.
        """
        deadline, delay_s = math.inf, _FIRST_DELAY_S
        while True:
            try:
                answer = http.request(method, url, **options)
            except httpx.TransportError as error:
                where = http.base_url.join(url).copy_with(query=None)
                reason = str(error) or type(error).__name__
                trouble = ApiError("unreachable", 0, f"cannot reach {where}: {reason}")
            else:
                if not answer.is_error:
                    return answer
                trouble = error_of(answer)
                if answer.status_code not in _TRY_AGAIN:
                    raise trouble
                retry_after = answer.headers.get("retry-after", "")
                if retry_after.isdecimal():  # the service sends seconds, never a date
                    delay_s = max(delay_s, float(retry_after))
            deadline = min(deadline, time.monotonic() + self._patience_s)
            if time.monotonic() + delay_s > deadline:
                raise trouble
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_DELAY_S)
