"""The client's connection: the token, retries, and streams of events."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import httpx

from serve_app.client.errors import ApiError, error_of
from serve_app.sse import MEDIA_TYPE, Decoder

_TEMPORARY = frozenset({429, 502, 503, 504})
_FIRST_DELAY_S = 0.2
_MAX_DELAY_S = 5.0
# Longer than the server's heartbeat interval: a longer silence means a dead connection.
_SILENCE_S = 45.0
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class Connection:
    """Sends requests to one service, with one token. Close it, or use it as a context manager."""

    def __init__(self, base_url: str, token: str, *, retry_for_s: float = 30.0) -> None:
        self._retry_for_s = retry_for_s
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

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._persist(self._http, method, path, **options)

    def _call_store(self, method: str, url: str, **options: Any) -> httpx.Response:
        """Send a request to a signed URL, without the token: the object store must not see it."""
        with httpx.Client(timeout=self._http.timeout, trust_env=self._http.trust_env) as bare:
            return self._persist(bare, method, url, **options)

    def _persist(self, http: httpx.Client, method: str, url: str, **options: Any) -> httpx.Response:
        """Send a request, and retry temporary failures for `retry_for_s` after the first one.

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
                if answer.status_code not in _TEMPORARY:
                    raise trouble
                retry_after = answer.headers.get("retry-after", "")
                if retry_after.isdecimal():  # the service sends seconds, never a date
                    delay_s = max(delay_s, float(retry_after))
            deadline = min(deadline, time.monotonic() + self._retry_for_s)
            if time.monotonic() + delay_s > deadline:
                raise trouble
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_DELAY_S)
