"""The rules of the StatusBoard port on the tests' Redis."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import cast
from uuid import UUID, uuid4

import pytest
from redis.asyncio import Redis

from persistence.redis.status import RedisStatusBoard
from persistence.redis.stream_codec import entry_fields, parse_id
from restoration.errors import DependencyUnavailable
from restoration.events import JobEvent, Previewed, Progressed, StateChanged
from restoration.jobs import Job, JobStatus, ParamValue
from restoration.ports.progress import StampedEvent
from tests.support.samples import ended_job

PATIENCE_S = 300
RUNNING = StateChanged(JobStatus.RUNNING, attempt=1)
DONE = StateChanged(JobStatus.SUCCEEDED, attempt=1)
# a value of each type, and a whole number that is a float
PARAMS: Mapping[str, ParamValue] = {"scale": 2, "blend": 0.5, "size": 1.0, "on": True, "as": "a"}


@pytest.fixture
async def board(redis_url: str, patience: None) -> AsyncIterator[RedisStatusBoard]:
    board = RedisStatusBoard(redis_url)
    yield board
    await board.aclose()


@pytest.fixture
def job_id() -> UUID:
    return uuid4()


def _progress(*percents: int) -> list[JobEvent]:
    return [Progressed(percent / 100, "upscaling", attempt=1) for percent in percents]


def _preview(data: bytes) -> Previewed:
    return Previewed.from_bytes(data, "image/jpeg", attempt=1)


async def _publish(board: RedisStatusBoard, job_id: UUID, *events: JobEvent) -> None:
    await board.publish([(job_id, event) for event in events])


async def _concluded(board: RedisStatusBoard, job: Job) -> list[StampedEvent]:
    await board.conclude(job)
    return await _take(board, job.id, 1)


async def _take(board: RedisStatusBoard, job_id: UUID, count: int) -> list[StampedEvent]:
    """Return the first `count` events that a new follower gets."""
    events = []
    async with asyncio.timeout(PATIENCE_S), aclosing(board.follow(job_id)) as stream:
        async for stamped in stream:
            events.append(stamped)
            if len(events) == count:
                break
    return events


class TestLatest:
    async def test_the_newest_of_each_type(self, board: RedisStatusBoard, job_id: UUID) -> None:
        """`latest` has the newest event of each type, even if several came in one call."""
        await _publish(board, job_id, RUNNING, *_progress(1, 2), _preview(b"old"))
        await _publish(board, job_id, _preview(b"new"), *_progress(3))
        latest = await board.latest([job_id])
        assert set(latest[job_id]) == {RUNNING, *_progress(3), _preview(b"new")}

    async def test_several_jobs_at_once(self, board: RedisStatusBoard) -> None:
        """One call may publish events of many jobs; jobs without events are not in `latest`."""
        one, two, silent = uuid4(), uuid4(), uuid4()
        await board.publish([(one, RUNNING), (two, DONE)])
        assert await board.latest([two, silent, one]) == {one: [RUNNING], two: [DONE]}
        assert await board.latest([]) == {}
        await board.publish([])

    async def test_nothing_is_kept_for_ever(
        self, board: RedisStatusBoard, redis: Redis, job_id: UUID
    ) -> None:
        """Every key of a job expires after its last event."""
        await _publish(board, job_id, RUNNING, _preview(b"picture"))
        keys = [key async for key in redis.scan_iter(f"*{job_id}*")]
        assert len(keys) == 2
        for key in keys:
            assert 0 < await redis.ttl(key) <= 24 * 3600

    async def test_previews_do_not_pile_up(
        self, board: RedisStatusBoard, redis: Redis, job_id: UUID
    ) -> None:
        """Redis holds only the newest preview."""
        for _ in range(50):
            await _publish(board, job_id, _preview(b"x" * 30_000))
        sizes = [
            int(cast("int", await redis.memory_usage(key)))
            async for key in redis.scan_iter(f"*{job_id}*")
        ]
        assert sum(sizes) < 100_000

    async def test_a_long_job_keeps_a_short_stream(
        self, board: RedisStatusBoard, redis: Redis, job_id: UUID
    ) -> None:
        """The stream is trimmed at its old end."""
        await _publish(board, job_id, *_progress(*range(100)) * 10, DONE)
        assert await redis.xlen(f"restore:{job_id}:events") <= 300
        assert DONE in (await board.latest([job_id]))[job_id]


class TestFollow:
    async def test_what_is_kept_and_what_is_new(
        self, board: RedisStatusBoard, job_id: UUID
    ) -> None:
        """A follower gets stored events and then new ones, in order and once each."""
        await _publish(board, job_id, RUNNING, *_progress(1))
        following = asyncio.create_task(_take(board, job_id, 5))
        other = uuid4()
        await board.publish([(other, RUNNING), *((job_id, e) for e in _progress(2, 3))])
        await _publish(board, job_id, DONE)
        events = await following
        assert [stamped.event for stamped in events] == [RUNNING, *_progress(1, 2, 3), DONE]

    async def test_ids_are_the_same_for_all_followers(
        self, board: RedisStatusBoard, job_id: UUID
    ) -> None:
        """A client resumes from an id, at whichever replica."""
        await _publish(board, job_id, RUNNING, *_progress(1, 2), DONE)
        events = await _take(board, job_id, 4)
        assert await _take(board, job_id, 4) == events
        ids = [parse_id(stamped.id) for stamped in events]
        assert ids == sorted(set(ids))

    async def test_followers_do_not_take_from_each_other(
        self, board: RedisStatusBoard, job_id: UUID
    ) -> None:
        """Followers that start at different times each see all events."""
        await _publish(board, job_id, RUNNING, *_progress(1))
        async with aclosing(board.follow(job_id)) as ahead:
            assert [(await anext(ahead)).event for _ in range(2)] == [RUNNING, *_progress(1)]
            waiting = asyncio.ensure_future(anext(ahead))
            behind = asyncio.create_task(_take(board, job_id, 3))
            await _take(board, job_id, 2)
            await _publish(board, job_id, DONE)
            assert (await waiting).event == DONE
        assert [stamped.event for stamped in await behind] == [RUNNING, *_progress(1), DONE]

    async def test_joining_while_an_event_arrives(
        self, board: RedisStatusBoard, job_id: UUID, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A concurrent read for earlier followers does not hide older events from a new one."""
        reader = board._reader
        await _publish(board, job_id, RUNNING)
        ahead = asyncio.create_task(_take(board, job_id, 2))
        await asyncio.sleep(0.05)  # usually long enough for the read to begin
        interrupt = reader._interrupt

        async def interrupt_late() -> None:
            await _publish(board, job_id, DONE)
            await ahead
            await interrupt()

        monkeypatch.setattr(reader, "_interrupt", interrupt_late)
        behind = await _take(board, job_id, 2)
        assert [stamped.event for stamped in behind] == [RUNNING, DONE]

    async def test_joining_does_not_wait_for_the_read_under_way(
        self,
        redis_url: str,
        patience: None,
        redis: Redis,
        job_id: UUID,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A new follower is served at once, even if the others' jobs stay silent."""
        for module in ("followers", "status"):
            monkeypatch.setattr(f"persistence.redis.{module}.BLOCK_S", 10 * PATIENCE_S)
        board = RedisStatusBoard(redis_url)
        silent = asyncio.create_task(_take(board, uuid4(), 1))
        await _until_blocked(redis, clients=1)
        await _publish(board, job_id, DONE)
        assert [stamped.event for stamped in await _take(board, job_id, 1)] == [DONE]
        await board.aclose()
        assert await silent == []

    async def test_many_followers_share_one_connection(
        self, board: RedisStatusBoard, redis: Redis
    ) -> None:
        """Fifty followers of fifty jobs get their own events over one blocked connection."""
        jobs = [uuid4() for _ in range(50)]
        following = [asyncio.create_task(_take(board, job, 1)) for job in jobs]
        await _until_blocked(redis, clients=1)
        await board.publish([(job, DONE) for job in jobs])
        assert [[s.event for s in events] for events in await asyncio.gather(*following)] == [
            [DONE]
        ] * 50

    async def test_the_newest_preview_reaches_followers(
        self, board: RedisStatusBoard, job_id: UUID
    ) -> None:
        """A follower sees previews in order among the events, without outdated ones."""
        await _publish(board, job_id, _preview(b"1"), *_progress(1), _preview(b"2"))
        async with asyncio.timeout(PATIENCE_S), aclosing(board.follow(job_id)) as stream:
            assert [(await anext(stream)).event for _ in range(2)] == [
                *_progress(1),
                _preview(b"2"),
            ]
            await _publish(board, job_id, _preview(b"3"))
            assert (await anext(stream)).event == _preview(b"3")

    async def test_an_unknown_event_is_passed_over(
        self, board: RedisStatusBoard, redis: Redis, job_id: UUID
    ) -> None:
        """Events of a newer version do not stop an older follower."""
        key = f"restore:{job_id}:events"
        await redis.xadd(key, {"event": '{"type": "from the future"}'})
        await redis.hset(f"restore:{job_id}:latest", "future", "?")
        assert await board.latest([job_id]) == {}
        await _publish(board, job_id, DONE)
        assert [stamped.event for stamped in await _take(board, job_id, 1)] == [DONE]

    @pytest.mark.progress
    async def test_an_end_comes_with_its_row(self, board: RedisStatusBoard) -> None:
        """The final event comes with the committed job, and is otherwise unchanged."""
        [stamped] = await _concluded(board, job := ended_job(params=PARAMS))
        assert stamped.event == StateChanged(job.status, job.attempt)
        assert stamped.row == job
        assert await board.latest([job.id]) == {job.id: [stamped.event]}

    @pytest.mark.progress
    async def test_a_large_row_stays_in_postgres(self, board: RedisStatusBoard) -> None:
        """The end of a job with a large graph comes without its row, to spare the followers."""
        [stamped] = await _concluded(board, job := ended_job(params={"graph": "x" * 20_000}))
        assert stamped.event == StateChanged(job.status, job.attempt)
        assert stamped.row is None

    @pytest.mark.progress
    async def test_a_row_that_cannot_be_read_is_none(
        self, board: RedisStatusBoard, redis: Redis, job_id: UUID
    ) -> None:
        """A final event from a newer version comes without its row."""
        end = entry_fields(DONE) | {"row": '{"id": "from the future"}'}
        await redis.xadd(f"restore:{job_id}:events", end)
        [stamped] = await _take(board, job_id, 1)
        assert (stamped.event, stamped.row) == (DONE, None)

    async def test_one_that_comes_late_loses_nothing_that_is_kept(
        self, board: RedisStatusBoard, job_id: UUID
    ) -> None:
        """A new follower gets all events that the stream still holds."""
        await _publish(board, job_id, *_progress(*range(100)), *_progress(*range(50)), DONE)
        events = [stamped.event for stamped in await _take(board, job_id, 151)]
        assert events == [*_progress(*range(100)), *_progress(*range(50)), DONE]

    async def test_closing_ends_the_followers(
        self, redis_url: str, patience: None, job_id: UUID
    ) -> None:
        """Followers end when the board is closed."""
        board = RedisStatusBoard(redis_url)
        await _publish(board, job_id, RUNNING)
        following = asyncio.create_task(_take(board, job_id, 2))
        await _take(board, job_id, 1)
        await board.aclose()
        assert [stamped.event for stamped in await following] == [RUNNING]

    @pytest.mark.parametrize("turns", range(12))
    async def test_a_follower_may_go_at_any_moment(
        self, board: RedisStatusBoard, job_id: UUID, turns: int
    ) -> None:
        """A follower cancelled after any number of event loop turns ends, even if Redis answers in
        the same turn."""
        await _publish(board, job_id, RUNNING)
        await board.latest([job_id])  # a connection waits: nothing suspends before the answer
        following = asyncio.create_task(_take(board, job_id, 2))
        for _ in range(turns):
            await asyncio.sleep(0)
        following.cancel()
        done, _ = await asyncio.wait({following}, timeout=PATIENCE_S)
        following.cancel()
        assert done


class TestWithoutRedis:
    async def test_followers_survive_a_cut_connection(
        self, board: RedisStatusBoard, redis: Redis, job_id: UUID
    ) -> None:
        """After all connections are lost, a follower goes on without missing an event."""
        await _publish(board, job_id, RUNNING)
        following = asyncio.create_task(_take(board, job_id, 3))
        await _until_blocked(redis, clients=1)
        await redis.client_kill_filter(_type="normal", skipme=True)
        await _publish(board, job_id, *_progress(1))
        await _publish(board, job_id, DONE)
        assert [s.event for s in await following] == [RUNNING, *_progress(1), DONE]

    async def test_everything_deleted(
        self, board: RedisStatusBoard, redis: Redis, job_id: UUID
    ) -> None:
        """After a flush, `latest` is empty, and followers see the next events."""
        await _publish(board, job_id, RUNNING)
        following = asyncio.create_task(_take(board, job_id, 2))
        await _until_blocked(redis, clients=1)
        await redis.flushdb()
        assert await board.latest([job_id]) == {}
        await _publish(board, job_id, DONE)
        assert [stamped.event for stamped in await following] == [RUNNING, DONE]

    @pytest.mark.parametrize("listens", [False, True])
    async def test_a_server_that_is_away(self, job_id: UUID, listens: bool) -> None:
        """Calls raise DependencyUnavailable if Redis refuses or hangs; followers wait."""
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            if listens:
                server.listen()
            board = RedisStatusBoard(f"redis://127.0.0.1:{server.getsockname()[1]}/0")
            following = asyncio.create_task(_take(board, job_id, 1))
            async with asyncio.timeout(PATIENCE_S):
                outcomes = await asyncio.gather(
                    board.publish([(job_id, DONE)]),
                    board.latest([job_id]),
                    board.ping(),
                    return_exceptions=True,
                )
            assert [type(outcome) for outcome in outcomes] == [DependencyUnavailable] * 3
            assert not following.done()
            await board.aclose()
            assert await following == []


async def _until_blocked(redis: Redis, clients: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await redis.info("clients"))["blocked_clients"] != clients:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
