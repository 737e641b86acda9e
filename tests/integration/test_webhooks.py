"""Webhooks from the end of a job in Postgres to a real HTTP receiver."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, text

from actors.webhooks import sender as sending
from actors.webhooks.sender import SendLimits, WebhookSender, http_client
from persistence.postgres import transitions
from persistence.postgres.database import AdvisoryLock, Database
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.leadership import DELIVERY_CHANNEL, Leadership
from persistence.postgres.webhook_outbox import Outbox
from restoration.errors import LeaseLost
from restoration.jobs import Job, JobStatus
from restoration.webhooks.messages import (
    Delivery,
    DeliveryStatus,
    DueDelivery,
    RetrySchedule,
    message_id,
    secret_key,
)
from restoration.webhooks.urls import WebhookRules
from tests.fakes.receiver import (
    SECRET,
    Answer,
    Receiver,
    drip,
    flood,
    receiving,
    silence,
    status,
    verify,
)
from tests.support import polling
from tests.support.samples import artifact, new_job

QUICK = RetrySchedule(first_s=0.02, longest_s=0.04)
LOCAL = WebhookRules(True, allow_http=True, networks=(ip_network("127.0.0.0/8"), ip_network("::1")))
LATER = RetrySchedule()  # A second try comes only after the end of these tests.
Done = Callable[[Delivery], bool]


@pytest.fixture
def store(database: Database) -> PostgresJobStore:
    return PostgresJobStore(database)


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Receiver]:
    monkeypatch.setattr(sending, "TICK_S", 0.02)
    async with receiving() as receiver:
        yield receiver


@asynccontextmanager
async def sent_by(
    database: Database,
    database_url: str,
    schedule: RetrySchedule = LATER,
    limits: SendLimits | None = None,
) -> AsyncIterator[None]:
    """Run a webhook sender."""
    limits = limits or SendLimits()
    signals = Leadership(database_url, AdvisoryLock.MAINTENANCE, DELIVERY_CHANNEL)
    assert await signals.acquire(10)
    async with http_client(limits, LOCAL) as http:
        courier = WebhookSender(Outbox(database), http, secret_key(SECRET), schedule, limits)
        working = asyncio.create_task(courier.run(signals))
        yield
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    await signals.aclose()


async def end_one(store: PostgresJobStore, url: str, **changes: Any) -> Job:
    await store.insert(new_job(webhook_url=url, **changes))
    job = await store.claim("w", 60, ["restore"])
    assert job is not None
    return await store.succeed(job.ref, artifact(), {})


async def until(store: PostgresJobStore, job_id: UUID, is_done: Done) -> Delivery:
    """Wait until the job's delivery satisfies the condition, and return it."""

    async def look() -> bool:
        return is_done((await store.deliveries([job_id]))[job_id])

    await polling.until(look)
    return (await store.deliveries([job_id]))[job_id]


def tried(delivery: Delivery) -> bool:
    return delivery.last_error is not None


def delivered(delivery: Delivery) -> bool:
    return delivery.status is DeliveryStatus.DELIVERED


@pytest.mark.webhooks
async def test_delivered_once_and_signed(
    database: Database, database_url: str, store: PostgresJobStore, receiver: Receiver
) -> None:
    """A receiver gets one signed webhook at once, at the URL that was asked for."""
    async with sent_by(database, database_url):
        job = await end_one(store, receiver.url())
        done = await until(store, job.id, delivered)
        await until(store, (await end_one(store, receiver.url())).id, delivered)
    assert (done.tries, done.last_error, done.next_try_at) == (1, None, None)
    first, _other = receiver.seen
    assert first.target == "/hook?token=1"
    assert first.headers["content-type"] == "application/json"
    assert first.id == message_id(job.id)
    assert verify(SECRET, first.headers, first.body)
    said = json.loads(first.body)
    assert (said["type"], said["data"]["id"]) == ("restoration.succeeded", str(job.id))


@pytest.mark.webhooks
async def test_what_was_left_is_sent_by_the_next_sender(
    database: Database, database_url: str, store: PostgresJobStore, receiver: Receiver
) -> None:
    """Webhooks of jobs that ended without a sender are sent by the next one."""
    jobs = [await end_one(store, receiver.url()) for _ in range(3)]
    async with sent_by(database, database_url):
        for job in jobs:
            await until(store, job.id, delivered)


@pytest.mark.webhooks
async def test_tried_again_under_the_same_id(
    database: Database, database_url: str, store: PostgresJobStore, receiver: Receiver
) -> None:
    """After errors the webhook is sent again with a new signature, until it is accepted."""
    receiver.script = [status(500), status(404), status(429)]
    async with sent_by(database, database_url, QUICK):
        job = await end_one(store, receiver.url())
        done = await until(store, job.id, delivered)
    assert done.tries == len(receiver.seen) == 4
    assert {seen.id for seen in receiver.seen} == {message_id(job.id)}
    assert all(verify(SECRET, seen.headers, seen.body) for seen in receiver.seen)


@pytest.mark.webhooks
async def test_failures_are_visible_and_wait_their_turn(
    database: Database, database_url: str, store: PostgresJobStore, receiver: Receiver
) -> None:
    """The row has the error and the time of the next try, 2.5 to 5 s after the first."""
    receiver.default = status(500)
    async with sent_by(database, database_url):
        job = await end_one(store, receiver.url())
        failed = await until(store, job.id, tried)
    assert (failed.status, failed.tries) == (DeliveryStatus.PENDING, 1)
    assert failed.last_error == "HTTP 500"
    assert failed.next_try_at is not None
    assert job.finished_at is not None
    assert (failed.next_try_at - job.finished_at).total_seconds() > 2.4
    assert len(receiver.seen) == 1


@pytest.mark.webhooks
async def test_a_receiver_that_is_busy_says_how_long(
    database: Database, database_url: str, store: PostgresJobStore, receiver: Receiver
) -> None:
    """Retry-After is respected."""
    receiver.default = status(503, Retry_After="1000")
    async with sent_by(database, database_url):
        job = await end_one(store, receiver.url())
        failed = await until(store, job.id, tried)
    assert failed.next_try_at is not None
    assert job.finished_at is not None
    assert 990 < (failed.next_try_at - job.finished_at).total_seconds() < 1100


@pytest.mark.webhooks
@pytest.mark.parametrize("answer", [silence, drip], ids=["silence", "drip"])
async def test_a_slow_answer_is_cut_off(
    database: Database,
    database_url: str,
    store: PostgresJobStore,
    receiver: Receiver,
    answer: Answer,
) -> None:
    """A try has a total time limit, whether the answer is silent or trickles."""
    receiver.default = answer
    async with sent_by(database, database_url, limits=SendLimits(timeout_s=0.3)):
        job = await end_one(store, receiver.url())
        failed = await until(store, job.id, tried)
    assert failed.last_error == "no response within 0.3 s"


@pytest.mark.webhooks
async def test_a_slow_host_holds_up_nobody_else(
    database: Database, database_url: str, store: PostgresJobStore, receiver: Receiver
) -> None:
    """A silent host with many pending webhooks does not delay those for other hosts."""
    limits = SendLimits(timeout_s=60, lease_s=120, at_once=3, per_host=2)
    released = asyncio.Event()

    async def hold(writer: asyncio.StreamWriter) -> None:
        await released.wait()
        await status(204)(writer)

    async with receiving() as slow:
        slow.default = hold
        held = [await end_one(store, slow.url()) for _ in range(8)]
        async with sent_by(database, database_url, limits=limits):
            await slow.wait_for(2)
            for _ in range(3):
                job = await end_one(store, receiver.url("localhost"))
                await until(store, job.id, delivered)
            assert len(slow.seen) == 2
            found = await store.deliveries([job.id for job in held])
            assert not any(map(delivered, found.values()))
            released.set()
            for job in held:
                await until(store, job.id, delivered)


@pytest.mark.webhooks
async def test_gone_is_for_good(
    database: Database, database_url: str, store: PostgresJobStore, receiver: Receiver
) -> None:
    """A 410 ends the delivery at once, visible in the row."""
    receiver.default = status(410)
    async with sent_by(database, database_url, QUICK):
        job = await end_one(store, receiver.url())
        dead = await until(store, job.id, tried)
    assert dead == Delivery(DeliveryStatus.DEAD, 1, "HTTP 410", None)


@pytest.mark.webhooks
async def test_after_a_day_it_is_dead_and_visible(
    database: Database, database_url: str, store: PostgresJobStore, receiver: Receiver
) -> None:
    """A delivery that fails 24 h after the job's end is dead, and its row gives the reason."""
    receiver.default = status(500)
    job = await end_one(store, receiver.url())
    await database.run(_make_a_day_older)
    async with sent_by(database, database_url, RetrySchedule(first_s=0.02, longest_s=0.04)):
        dead = await until(store, job.id, lambda d: d.status is DeliveryStatus.DEAD)
        await until(store, (await end_one(store, receiver.url())).id, tried)
    assert dead == Delivery(DeliveryStatus.DEAD, 1, "HTTP 500", None)
    assert [seen.id for seen in receiver.seen].count(message_id(job.id)) == 1


def _make_a_day_older(connection: Connection) -> None:
    connection.execute(text("UPDATE deliveries SET created_at = created_at - interval '24 hours'"))


@pytest.mark.webhooks
async def test_a_redirect_is_not_followed(
    database: Database, database_url: str, store: PostgresJobStore, receiver: Receiver
) -> None:
    """A redirect is a failure like another, so that no receiver can redirect us."""
    receiver.script = [status(307, Location=receiver.url(path="/elsewhere"))]
    async with sent_by(database, database_url):
        job = await end_one(store, receiver.url())
        failed = await until(store, job.id, tried)
    assert failed.last_error == "HTTP 307"
    assert [seen.target for seen in receiver.seen] == ["/hook?token=1"]


@pytest.mark.webhooks
async def test_an_endless_answer_is_not_read(
    database: Database, database_url: str, store: PostgresJobStore, receiver: Receiver
) -> None:
    """The status counts, and only a little of the body is read."""
    receiver.default = flood
    async with sent_by(database, database_url):
        job = await end_one(store, receiver.url())
        assert (await until(store, job.id, delivered)).tries == 1


@pytest.mark.webhooks
async def test_nothing_of_a_receiver_is_remembered(
    database: Database, database_url: str, store: PostgresJobStore, receiver: Receiver
) -> None:
    """A cookie set by one answer is not sent with the next webhook."""
    receiver.default = status(204, Set_Cookie="session=secret; Path=/")
    async with sent_by(database, database_url):
        for _ in range(2):
            await until(store, (await end_one(store, receiver.url())).id, delivered)
    assert all("cookie" not in seen.headers for seen in receiver.seen)


@pytest.mark.webhooks
async def test_nobody_there_is_a_failure_like_another(
    database: Database, database_url: str, store: PostgresJobStore, receiver: Receiver
) -> None:
    """A refused connection and an answer that is not HTTP are recorded and retried."""

    async def babble(writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello\r\n\r\n")

    receiver.script = [babble]
    async with sent_by(database, database_url):
        garbled = await end_one(store, receiver.url())
        refused = await end_one(store, "http://127.0.0.1:1/hook")
        assert "RemoteProtocolError" in str((await until(store, garbled.id, tried)).last_error)
        assert "ConnectError" in str((await until(store, refused.id, tried)).last_error)


@pytest.mark.webhooks
async def test_a_try_whose_sender_died_is_repeated_under_the_same_id(
    database: Database, store: PostgresJobStore, receiver: Receiver
) -> None:
    """A claimed webhook without a report is claimed again when its lease lapses. After that a late
    failure of the first try changes nothing, but a late success counts."""
    outbox = Outbox(database)
    job = await end_one(store, receiver.url())
    [first] = await outbox.claim(10, 10, lease_s=0)
    [second] = await outbox.claim(10, 10, lease_s=60)
    assert (first.tries, second.tries) == (1, 2)
    assert message_id(first.job.id) == message_id(second.job.id) == message_id(job.id)
    assert await outbox.claim(10, 10, lease_s=60) == []
    before = await store.deliveries([job.id])
    await outbox.failed(first, "late", None)
    await outbox.failed(first, "late", 5)
    assert await store.deliveries([job.id]) == before
    await outbox.delivered(first)
    await outbox.failed(second, "too late", 5)
    assert (await store.deliveries([job.id]))[job.id].status is DeliveryStatus.DELIVERED


@pytest.mark.webhooks
async def test_two_senders_share_the_outbox_out(
    database: Database, store: PostgresJobStore
) -> None:
    """Concurrent claims never take a delivery twice."""
    for _ in range(12):
        await end_one(store, "https://example.com/")
    outbox = Outbox(database)
    claims: list[Awaitable[object]] = [outbox.claim(5, 100, lease_s=60) for _ in range(4)]
    taken = [due for claim in await asyncio.gather(*claims) for due in _list(claim)]
    assert len({due.job.id for due in taken}) == len(taken)
    rest = await outbox.claim(100, 100, lease_s=60)
    assert len(taken) + len(rest) == 12


def _list(claim: object) -> list[DueDelivery]:
    assert isinstance(claim, list)
    return claim


@pytest.mark.webhooks
async def test_hosts_take_turns(database: Database, store: PostgresJobStore) -> None:
    """A claim takes a few deliveries per host, the most overdue first, and none of excluded
    hosts."""
    for _ in range(5):
        await end_one(store, "https://many.example.com/")
    few = await end_one(store, "https://few.example.com/")
    outbox = Outbox(database)
    taken = await outbox.claim(10, 2, lease_s=60)
    by_host = sorted(taken, key=lambda due: due.host)
    assert [due.host for due in by_host] == ["few.example.com"] + ["many.example.com"] * 2
    assert by_host[0].job == few
    assert await outbox.claim(10, 2, 60, without={"many.example.com"}) == []
    assert len(await outbox.claim(1, 2, 60)) == 1


@pytest.mark.webhooks
async def test_owners_take_turns(database: Database, store: PostgresJobStore) -> None:
    """However many slow hosts an owner has, another owner's webhook is among the next."""
    for number in range(6):
        await end_one(store, f"https://n{number}.example.com/")
    late = await end_one(store, "https://other.example.com/", owner="bob")
    outbox = Outbox(database)
    [first, second] = await outbox.claim(2, 4, lease_s=60)
    assert late in (first.job, second.job)
    assert len(await outbox.claim(10, 4, lease_s=60)) == 5


@pytest.mark.webhooks
async def test_the_end_and_its_delivery_are_one(
    database: Database, store: PostgresJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a job and its delivery are written together or not at all."""
    await store.insert(new_job(webhook_url="https://example.com/"))
    job = await store.claim("w", 60, ["restore"])
    assert job is not None

    def crash(_job: Job, _connection: Connection) -> None:
        raise RuntimeError("the process died before the delivery")

    def end_and_crash(connection: Connection) -> None:
        transitions.succeed(job.ref, artifact(), {}, connection)
        raise LeaseLost("the process died before the commit")

    with monkeypatch.context() as patched:
        patched.setattr("persistence.postgres.webhook_outbox.enqueue", crash)
        with pytest.raises(RuntimeError, match="died"):
            await store.succeed(job.ref, artifact(), {})
    with pytest.raises(LeaseLost):
        await database.run(end_and_crash)
    assert (await store.get(job.id)).status is JobStatus.RUNNING
    assert await store.deliveries([job.id]) == {}
    await store.succeed(job.ref, artifact(), {})
    assert list(await store.deliveries([job.id])) == [job.id]
