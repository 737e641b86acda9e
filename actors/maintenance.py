"""Work after jobs have ended: sends webhooks and removes expired data, in one process.

No job waits for it. One replica leads, by an advisory lock in Postgres; during a rolling update the
new replica waits until the old one stops.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import NoReturn

from opentelemetry import trace

from actors.leader.election import lead_whenever_possible
from actors.leader.retention import Lifetimes, RetentionSweeper
from actors.observability.logging import configure_logging
from actors.observability.metrics import RayMeter
from actors.observability.tracing import tracer_provider
from actors.webhooks.sender import TICK_S, SendLimits, WebhookSender, http_client
from persistence.objects.s3 import S3BlobStore
from persistence.postgres.database import AdvisoryLock, Database
from persistence.postgres.leadership import DELIVERY_CHANNEL, Leadership
from persistence.postgres.retention import Retention
from persistence.postgres.webhook_outbox import Outbox
from restoration.settings import Settings, load_settings
from restoration.tasks import stop
from restoration.webhooks.messages import secret_key

_CONNECTIONS = 4
# asyncio resolves names on its default executor, which has few threads; slow lookups must not delay
# the others.
_RESOLVER_THREADS = 64


class Maintenance:
    """The Serve deployment. Secrets come from the node's environment."""

    def __init__(self) -> None:
        settings = load_settings(os.environ)
        configure_logging(settings.log_format)
        trace.set_tracer_provider(tracer_provider(settings.otlp_endpoint, "maintenance"))
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(_RESOLVER_THREADS))
        self._task = loop.create_task(_work(settings))

    def check_health(self) -> None:
        """Raise if the replica's task has ended; Serve then replaces the replica."""
        if self._task.done():
            self._task.result()

    async def __del__(self) -> None:
        await stop(self._task)


async def _work(settings: Settings) -> NoReturn:
    async with AsyncExitStack() as resources:
        url = settings.database_url.get_secret_value()
        database = Database(url, pool_size=_CONNECTIONS)
        resources.push_async_callback(database.aclose)
        blobs = S3BlobStore.from_settings(settings)
        resources.push_async_callback(blobs.aclose)
        http = http_client(SendLimits(), settings.webhook_rules)
        await resources.enter_async_context(http)
        sender = None
        if settings.webhook_secret is not None:
            sender = WebhookSender(
                Outbox(database),
                http,
                secret_key(settings.webhook_secret.get_secret_value()),
                meter=RayMeter(),
            )
        sweeper = RetentionSweeper(Retention(database), blobs, Lifetimes.from_settings(settings))

        async def lead(signals: Leadership) -> NoReturn:
            sweeping = asyncio.create_task(sweeper.run())
            try:
                if sender is not None:
                    await sender.run(signals)
                while True:  # without a secret submissions with a webhook are refused
                    await signals.wait(TICK_S)
            finally:
                await stop(sweeping)

        await lead_whenever_possible(
            lead, lambda: Leadership(url, AdvisoryLock.MAINTENANCE, DELIVERY_CHANNEL), "maintenance"
        )
