"""The client's calls for single jobs: submit, follow, list, cancel, retry, and fetch results."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict, Unpack
from uuid import UUID, uuid4

import httpx
from pydantic import ValidationError

from restoration.events import JobEvent, Progressed, StateChanged, from_json, is_last
from restoration.files import write_whole
from restoration.images import sniff
from restoration.jobs import JobStatus, OutputFormat, Priority
from restoration.reuse import Reuse
from serve_app.client.connection import Connection
from serve_app.client.errors import ApiError, parse
from serve_app.schemas.restorations import Restoration, RestorationPage, UploadView
from serve_app.sse import Decoder

API = "/api/v1/restorations"
POLL_S = 1.0
_WAIT_S = 60  # the longest wait that the service allows
_WAITING = {"Prefer": f"wait={_WAIT_S}", "Accept": "image/*, application/json;q=0.5"}
_WAIT_TIMEOUT = httpx.Timeout(_WAIT_S + 30.0, connect=5.0)


class SubmissionOptions(TypedDict, total=False):
    """Options of a submission; the service has defaults for those left out.

    Limits are in seconds, and may only shorten the workflow's. The result keeps the photo's EXIF
    only with `keep_metadata`. A job that may `reuse` a stored result succeeds at once if there is
    one.
    """

    workflow: str
    params: Mapping[str, object]
    output_format: OutputFormat
    priority: Priority
    idempotency_key: str | None
    queue_limit_s: float | None
    run_limit_s: float | None
    webhook_url: str | None
    keep_metadata: bool
    reuse: Reuse


class RestorationCalls(Connection):
    def submit(
        self, photo: Path | bytes | UUID, **options: Unpack[SubmissionOptions]
    ) -> Restoration:
        """Submit a photo, or the id of an `upload`; on return the job is stored and will end.

        Raises ApiError, and OSError for a file that cannot be read.
        """
        return parse(Restoration, self._submit(photo, options, {}))

    def restore(self, photo: Path | bytes | UUID, **options: Unpack[SubmissionOptions]) -> bytes:
        """Submit a photo, wait however long it takes, and return the verified result.

        A job of less than a minute takes a single request. Raises ApiError, also for a job that
        ended without a result.
        """
        options["idempotency_key"] = options.get("idempotency_key") or str(uuid4())
        try:
            answer = self._submit(photo, options, _WAITING, timeout=_WAIT_TIMEOUT)
        except ApiError as error:
            if error.refused:
                raise
            # The service may have been lost late in the wait; a job that it recorded is safe, and
            # the same key finds it.
            answer = self._submit(photo, options, {})
        if answer.headers.get("content-type", "").startswith("image/"):
            return _checked(answer, answer.headers.get("etag", "").strip('"'))
        return self._result(self.wait(parse(Restoration, answer).id))

    def download(self, job_id: UUID | str, out: Path) -> Restoration:
        """Write the verified result to `out`, whole or not at all."""
        job = self.get(job_id)
        data = self._result(job)
        write_whole(out, data)
        return job

    def upload(self, photo: Path | bytes) -> UUID:
        """Send a photo straight to the object store, and return the upload's id for `submit`."""
        data = _read(photo)
        asked = {
            "content_type": sniff(data).value,
            "size_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        upload = parse(UploadView, self._call("POST", "/api/v1/uploads", json=asked))
        self._call_store(upload.method, upload.url, content=data, headers=upload.headers)
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

    def _result(self, job: Restoration) -> bytes:
        answer = self._call("GET", f"{API}/{job.id}/result")
        if answer.is_redirect:
            answer = self._call_store("GET", answer.headers["location"])
        return _checked(answer, job.output.sha256 if job.output else "")

    def _submit(
        self,
        photo: Path | bytes | UUID,
        options: SubmissionOptions,
        headers: Mapping[str, str],
        **request: Any,
    ) -> httpx.Response:
        given = {name: value for name, value in options.items() if value is not None}
        key = given.pop("idempotency_key", None) or str(uuid4())
        fields = {
            name: str(value) if isinstance(value, str) else json.dumps(value)
            for name, value in given.items()
        }
        # the service does not use the file's name
        part: dict[str, tuple[str | None, bytes]] = (
            {"upload_id": (None, str(photo).encode())}
            if isinstance(photo, UUID)
            else {"image": ("photo", _read(photo))}
        )
        return self._call(
            "POST",
            API,
            files=part,
            data=fields,
            headers={**headers, "Idempotency-Key": str(key)},
            **request,
        )


def _read(photo: Path | bytes) -> bytes:
    """Return the photo's bytes. Raises OSError."""
    return photo if isinstance(photo, bytes) else photo.read_bytes()


def _checked(answer: httpx.Response, sha256: str) -> bytes:
    if hashlib.sha256(answer.content).hexdigest() != sha256:
        raise ApiError(
            "corrupt_download",
            answer.status_code,
            "the result was damaged in transit: its sha256 differs",
        )
    return answer.content
