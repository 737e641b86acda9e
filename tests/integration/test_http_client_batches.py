"""The Python client's batches against a real server, and over a bad connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest

from restoration.batches import BatchStatus
from restoration.jobs import OutputFormat, Priority
from serve_app.client import ApiError, RestorationClient
from tests.fakes.live_site import LiveSite, LosesTheFirstAnswer, open_live_site
from tests.fakes.site import photo


@pytest.fixture
async def live() -> AsyncIterator[LiveSite]:
    async with open_live_site() as live:
        yield live


@pytest.mark.batches
async def test_a_batch_from_files(live: LiveSite, tmp_path: Path) -> None:
    """Files become a batch in the given order, with an outcome for each."""
    paths = []
    for index in range(150):
        paths.append(tmp_path / f"{index}.png")
        paths[-1].write_bytes(b"?" if index == 70 else photo())

    def work(client: RestorationClient) -> None:
        batch = client.submit_batch(
            paths, workflow="enlarge", params={"strength": 0.5}, output_format=OutputFormat.WEBP
        )
        assert [item.name for item in batch.items] == [path.name for path in paths]
        assert (batch.counts.queued, batch.counts.refused) == (149, 1)
        assert list(client.batch_items(batch.id)) == list(batch.items)
        job = client.get(str(batch.items[0].job_id))
        assert (job.batch_id, job.params["strength"], job.priority) == (
            batch.id,
            0.5,
            Priority.BATCH,
        )
        client.submit_batch(paths[:1])
        assert [shown.size for shown in client.batches(limit=1)] == [1, 150]
        assert client.cancel_batch(batch.id).status is BatchStatus.CANCELLED
        assert client.batch(batch.id).counts.cancelled == 149

    await live.call(work)


@pytest.mark.batches
async def test_an_answer_lost_on_the_way_makes_no_second_batch(
    live: LiveSite, tmp_path: Path
) -> None:
    """The client sends the files again with the same key, and gets the first batch."""
    path = tmp_path / "photo.png"
    path.write_bytes(photo())
    await live.stop()
    live.app = LosesTheFirstAnswer(live.app)
    await live.start()
    batch = await live.call(lambda client: client.submit_batch([path, path]))
    assert list(live.site.batches.rows) == [batch.id]
    assert len(live.site.jobs.rows) == len(live.site.blobs.objects) == 2


@pytest.mark.batches
async def test_a_file_that_cannot_be_read_submits_nothing(live: LiveSite, tmp_path: Path) -> None:
    """A missing file raises an error before anything is sent."""
    with pytest.raises(FileNotFoundError):
        await live.call(lambda client: client.submit_batch([tmp_path / "missing.png"]))
    assert live.site.batches.rows == {}


@pytest.mark.batches
async def test_a_batch_is_followed_while_the_server_is_away(live: LiveSite, tmp_path: Path) -> None:
    """A broken stream of a batch is resumed and followed to the end."""
    path = tmp_path / "photo.png"
    path.write_bytes(photo())
    batch = await live.call(lambda client: client.submit_batch([path]))
    loop, watched = asyncio.get_running_loop(), asyncio.Event()

    def work(client: RestorationClient) -> list[BatchStatus]:
        seen = []
        for progress in client.batch_events(batch.id):
            seen.append(progress.status)
            loop.call_soon_threadsafe(watched.set)
        return seen

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(live.call(work))
        await watched.wait()
        await live.stop()
        await live.start()
        await live.site.succeed(await live.site.start(UUID(str(batch.items[0].job_id))))
    assert watching.result()[0] is BatchStatus.RUNNING
    assert watching.result()[-1] is BatchStatus.SUCCEEDED


@pytest.mark.batches
async def test_events_of_no_batch_end(live: LiveSite) -> None:
    """Events of a missing batch raise an error instead of waiting."""
    with pytest.raises(ApiError, match="batch_not_found"):
        await live.call(lambda client: list(client.batch_events(UUID(int=0))))
