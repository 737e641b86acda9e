"""The client's connection: the token, retries, and streams of events."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import httpx
import tenacity

from actors.cluster.retry import GiveUpAfter
from serve_app.client.errors import ApiError, error_of
from serve_app.sse import MEDIA_TYPE, Decoder

_TEMPORARY = frozenset({429, 502, 503, 504})
_BACKOFF = tenacity.wait_exponential(0.2, max=5.0)
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
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(httpx.TransportError)
            | tenacity.retry_if_result(lambda answer: answer.status_code in _TEMPORARY),
            wait=_delay_s,
            stop=GiveUpAfter(self._retry_for_s),
            reraise=True,
        )
        try:
            answer: httpx.Response = retrying(http.request, method, url, **options)
        except httpx.TransportError as error:
            where = http.base_url.join(url).copy_with(query=None)
            reason = str(error) or type(error).__name__
            raise ApiError("unreachable", 0, f"cannot reach {where}: {reason}") from error
        except tenacity.RetryError as error:
            answer = error.last_attempt.result()
        if answer.is_error:
            raise error_of(answer)
        return answer


def _delay_s(state: tenacity.RetryCallState) -> float:
    """Return the backoff, or the longer delay that the response asks for."""
    asked = ""
    if state.outcome is not None and not state.outcome.failed:
        asked = state.outcome.result().headers.get("retry-after", "")
    # The service sends seconds, never a date.
    return max(_BACKOFF(state), float(asked) if asked.isdecimal() else 0)
