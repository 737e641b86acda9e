"""Sends the webhooks in the outbox. Plain async code, no Ray.

A slow, broken or hostile receiver delays only its own deliveries: each try is limited to a few
seconds, and each host to a few concurrent tries. Redirects are not followed, and only the status
of a response counts. `actors.webhooks.pinned_transport` checks the receiver's addresses.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx
import structlog
from opentelemetry.trace import SpanKind

from actors.observability.tracing import W3C, context_of, trace_id_of, tracer
from actors.webhooks.pinned_transport import PinnedTransport, Resolve, resolve
from persistence.postgres.leadership import Leadership
from persistence.postgres.webhook_outbox import Outbox
from restoration.errors import DependencyUnavailable
from restoration.observability.metrics import WEBHOOKS, Meter, NullMeter
from restoration.webhooks.messages import (
    DueDelivery,
    RetrySchedule,
    message_id,
    payload,
    signed_headers,
)
from restoration.webhooks.urls import WebhookRules

log = structlog.get_logger(__name__)

# The outbox is polled this often without a hint, for deliveries to retry.
TICK_S = 1.0
MAX_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class SendLimits:
    """Limits of sending. `timeout_s` bounds a whole try; a shorter lease would duplicate tries."""

    timeout_s: float = 5.0
    connect_timeout_s: float = 2.0
    lease_s: float = 30.0
    at_once: int = 32
    per_host: int = 4
    max_answer_bytes: int = 4 * 1024


@dataclass(frozen=True, slots=True)
class FailedTry:
    """`is_final`: do not retry; `retry_after_s`: the receiver's minimum delay."""

    error: str
    is_final: bool = False
    retry_after_s: float = 0


def http_client(
    limits: SendLimits,
    rules: WebhookRules,
    resolve: Resolve = resolve,
    tls: ssl.SSLContext | None = None,
) -> httpx.AsyncClient:
    """Return a client for untrusted receivers: no redirects, no cookies, no kept connections.

    Proxies from the environment are ignored, because a proxy would resolve the names itself.
    """
    connections = httpx.Limits(max_connections=limits.at_once, max_keepalive_connections=0)
    return httpx.AsyncClient(
        transport=PinnedTransport(rules, connections, resolve, tls),
        timeout=httpx.Timeout(limits.timeout_s, connect=limits.connect_timeout_s),
        follow_redirects=False,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        headers={"User-Agent": "comfy-restore", "Content-Type": "application/json"},
        trust_env=False,
    )


class WebhookSender:
    """Delivers webhooks, signed with `key`. `clock` returns the signed time, in epoch seconds."""

    def __init__(
        self,
        outbox: Outbox,
        http: httpx.AsyncClient,
        key: bytes,
        schedule: RetrySchedule | None = None,
        limits: SendLimits | None = None,
        clock: Callable[[], float] = time.time,
        meter: Meter | None = None,
    ) -> None:
        self._outbox = outbox
        self._http = http
        self._key = key
        self._schedule = schedule or RetrySchedule()
        self._limits = limits or SendLimits()
        self._clock = clock
        self._meter = meter or NullMeter()
        self._wake = asyncio.Event()
        self._sending: dict[asyncio.Task[None], str] = {}

    async def run(self, signals: Leadership) -> None:
        """Deliver until the lead is lost, which raises DependencyUnavailable.

        Deliveries in progress are completed, also after a cancellation.
        """
        hints = asyncio.create_task(self._listen(signals))
        try:
            while not hints.done():
                self._wake.clear()
                await self._send_due()
                await self._wake.wait()
            hints.result()
        finally:
            hints.cancel()
            await asyncio.gather(hints, *self._sending, return_exceptions=True)

    async def _listen(self, signals: Leadership) -> None:
        try:
            while True:
                await signals.wait(TICK_S)
                self._wake.set()
        finally:
            self._wake.set()

    async def _send_due(self) -> None:
        free = self._limits.at_once - len(self._sending)
        if free <= 0:
            return
        busy = set(self._sending.values())
        due = await self._outbox.claim(free, self._limits.per_host, self._limits.lease_s, busy)
        for delivery in due:
            task = asyncio.create_task(self._deliver(delivery))
            self._sending[task] = delivery.host
            task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        del self._sending[task]
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("delivery_broke", exc_info=error)  # a bug; retried after the lease expires

    async def _deliver(self, due: DueDelivery) -> None:
        """Try once, and record the outcome. If it cannot be recorded, the delivery is retried."""
        trace_id = trace_id_of(due.job.traceparent)
        with structlog.contextvars.bound_contextvars(**{"trace_id": trace_id} if trace_id else {}):
            with tracer.start_as_current_span(
                "webhook",
                context_of(due.job.traceparent),
                SpanKind.CLIENT,
                {"job.id": str(due.job.id), "server.address": due.host},
            ):
                failed_try = await self._post(due)
            await self._conclude(due, failed_try)

    async def _conclude(self, due: DueDelivery, failed_try: FailedTry | None) -> None:
        job_id, delay_s = str(due.job.id), None
        try:
            if failed_try is None:
                await self._outbox.delivered(due)
                self._meter.count(WEBHOOKS, {"outcome": "delivered"})
                log.info("webhook_delivered", job_id=job_id, host=due.host)
                return
            if not failed_try.is_final:
                delay_s = self._schedule.delay_s(due.tries, due.age_s, failed_try.retry_after_s)
            await self._outbox.failed(due, failed_try.error, delay_s)
        except DependencyUnavailable as error:
            log.warning("delivery_not_recorded", job_id=job_id, reason=error.message)
            return
        self._meter.count(WEBHOOKS, {"outcome": "dead" if delay_s is None else "failed"})
        log.warning(
            "webhook_dead" if delay_s is None else "webhook_failed",
            job_id=job_id,
            host=due.host,
            tries=due.tries,
            reason=failed_try.error,
            retry_in_s=delay_s,
        )

    async def _post(self, due: DueDelivery) -> FailedTry | None:
        url, body = due.job.options.webhook_url or "", payload(due.job)
        message = message_id(due.job.id)
        headers = signed_headers(self._key, message, int(self._clock()), body)
        W3C.inject(headers)
        answer: httpx.Response | None = None
        read_bytes = 0
        try:
            # httpx's timeout is for each read: a receiver that drips bytes would never exceed it
            async with asyncio.timeout(self._limits.timeout_s):
                async with self._http.stream("POST", url, content=body, headers=headers) as answer:
                    # Read a receiver's short response to its end, so that it is not cut off.
                    async for chunk in answer.aiter_raw():
                        read_bytes += len(chunk)
                        if read_bytes > self._limits.max_answer_bytes:
                            break
        except TimeoutError:
            failed_try = FailedTry(f"no response within {self._limits.timeout_s:g} s")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            failed_try = FailedTry(reason[:MAX_ERROR_CHARS])
        return failed_try if answer is None else _judge(answer)


def _judge(answer: httpx.Response) -> FailedTry | None:
    """Judge a response by its status alone; its body is untrusted and ignored."""
    if answer.is_success:
        return None
    # The date form of Retry-After is ignored: it depends on synchronized clocks.
    retry_after = answer.headers.get("retry-after", "")
    in_seconds = retry_after.isascii() and retry_after.isdigit()
    return FailedTry(
        f"HTTP {answer.status_code}",
        is_final=answer.status_code == HTTPStatus.GONE,
        retry_after_s=float(retry_after) if in_seconds else 0,
    )
