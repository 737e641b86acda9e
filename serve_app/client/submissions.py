"""The calls of the Python client that submit photos and fetch results."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack
from uuid import UUID, uuid4

import httpx

from restoration.files import write_whole
from restoration.jobs import OutputFormat, Priority
from restoration.reuse import Reuse
from serve_app.client.errors import ApiError, parse
from serve_app.schemas.restorations import Restoration

API = "/api/v1/restorations"
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


class SubmissionCalls(ABC):
    @abstractmethod
    def _call(self, method: str, path: str, **options: Any) -> httpx.Response: ...

    @abstractmethod
    def _fetch(self, url: str) -> httpx.Response: ...

    @abstractmethod
    def get(self, job_id: UUID | str) -> Restoration: ...

    @abstractmethod
    def wait(self, job_id: UUID | str) -> Restoration: ...

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

    def _result(self, job: Restoration) -> bytes:
        answer = self._call("GET", f"{API}/{job.id}/result")
        if answer.is_redirect:
            answer = self._fetch(answer.headers["location"])
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
            else {"image": ("photo", read(photo))}
        )
        return self._call(
            "POST",
            API,
            files=part,
            data=fields,
            headers={**headers, "Idempotency-Key": str(key)},
            **request,
        )


def read(photo: Path | bytes) -> bytes:
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
