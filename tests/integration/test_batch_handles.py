"""Batches through Ray handles: the calls of batch scripts, on in-memory stores.

Everything but Ray's transport is real: calls cross threads and are pickled, as with Ray.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pytest

from actors.batch import AcceptedBatch, Batch
from actors.cluster import retry
from actors.cluster.handles import IngressHandle
from restoration import batches as rules
from restoration.batches import MAX_BATCH_ITEMS, BatchCounts, BatchStatus
from restoration.errors import (
    BatchExpired,
    BatchNotFound,
    BatchTooLarge,
    DependencyUnavailable,
    InvalidParameters,
    InvalidRequest,
    QueueFull,
    UnknownWorkflow,
)
from restoration.jobs import Artifact, JobStatus, OutputFormat, Priority
from serve_app.deployment import Ingress
from tests.fakes.site import Site, open_site, photo

_T = TypeVar("_T")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with open_site() as site:
        yield site


class Handle:
    """A fake of Serve's handle of the ingress."""

    def __init__(self, site: Site) -> None:
        self._ingress = Ingress.__new__(Ingress)
        self._ingress._services = site.services
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Handle.Method:
        return Handle.Method(self, name)

    class Method:
        def __init__(self, handle: Handle, name: str) -> None:
            self._handle, self._name = handle, name

        def remote(self, *arguments: object) -> Handle.Response:
            call = asyncio.run_coroutine_threadsafe(self._call(arguments), self._handle._loop)
            return Handle.Response(call)

        async def _call(self, arguments: tuple[object, ...]) -> Any:
            copies = _pickled(arguments)
            return _pickled(await getattr(self._handle._ingress, self._name)(*copies))

    @dataclass
    class Response:
        answer: Future[Any]

        def result(self, timeout_s: float) -> Any:
            return self.answer.result(timeout_s)


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301 # our own


async def _call(site: Site, work: Callable[[Batch], _T]) -> _T:
    """Run `work` on a script's connection in a thread, because the services run on this loop."""
    handle: Any = Handle(site)
    nobody: Any = None
    return await asyncio.to_thread(work, Batch(IngressHandle(handle), nobody, "archive"))


def files(folder: Path, *contents: bytes) -> list[Path]:
    paths = [folder / f"{index}.png" for index in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


@pytest.mark.batches
async def test_files_become_one_batch(site: Site, tmp_path: Path) -> None:
    """Each file becomes a job or gets a reason, and the batch is watched and cancelled as one."""
    paths = files(tmp_path, photo(), b"?", photo((9, 9)), b"")

    def work(batch: Batch) -> AcceptedBatch:
        return batch.submit_batch(
            paths, workflow="enlarge", params={"strength": 0.5}, output_format=OutputFormat.WEBP
        )

    accepted = await _call(site, work)
    assert list(accepted.jobs.values()) == [paths[0], paths[2]]
    assert [(path, reason.code) for path, reason in accepted.refused] == [
        (paths[1], "unsupported_image"),
        (paths[3], "invalid_request"),
    ]
    for job_id, path in accepted.jobs.items():
        job = site.jobs.rows[job_id]
        assert (job.owner, job.workflow, job.params["strength"]) == ("archive", "enlarge", 0.5)
        assert (job.output_format, job.options.priority) == (OutputFormat.WEBP, Priority.BATCH)
        assert job.batch_index == paths.index(path)
        assert site.blobs.objects[job.input.key] == path.read_bytes()
    standing = await _call(site, lambda batch: batch.batch_status(accepted.id))
    assert standing.counts == BatchCounts(queued=2, refused=2)
    ended = await _call(site, lambda batch: batch.cancel_batch(accepted.id))
    assert ended.status is BatchStatus.CANCELLED
    assert {job.status for job in site.jobs.rows.values()} == {JobStatus.CANCELLED}


@pytest.mark.batches
@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"workflow": "nope"}, UnknownWorkflow),
        ({"params": {"strength": 7}}, InvalidParameters),
        ({"paths": []}, InvalidRequest),
        ({"paths": [Path("missing.png")]}, FileNotFoundError),
        ({"paths": [Path("missing.png")] * (MAX_BATCH_ITEMS + 1)}, BatchTooLarge),
    ],
    ids=["workflow", "parameters", "no file", "missing file", "too many"],
)
async def test_what_is_wrong_with_all_of_it_is_raised(
    site: Site, tmp_path: Path, asked: dict[str, Any], error: type[Exception]
) -> None:
    """No batch and no job is recorded."""
    [path] = files(tmp_path, photo())
    with pytest.raises(error):
        await _call(site, lambda batch: batch.submit_batch(**{"paths": [path], **asked}))
    assert (site.jobs.rows, site.batches.rows) == ({}, {})


@pytest.mark.batches
async def test_an_outage_while_submitting_is_waited_out(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although S3 fails for a moment, and the last call's answer is lost, there is one batch."""
    monkeypatch.setattr(retry, "RETRY_S", 0)
    put, insert, lost = site.blobs.put, site.batches.insert, 0

    async def put_later(key: str, data: bytes, content_type: str) -> Artifact:
        site.blobs.down = not site.blobs.down
        return await put(key, data, content_type)

    async def insert_and_lose(*arguments: Any) -> Any:
        nonlocal lost
        recorded = await insert(*arguments)
        lost += 1
        site.jobs.down = lost == 1
        try:
            await site.jobs.ping()
        finally:
            site.jobs.down = False
        return recorded

    monkeypatch.setattr(site.blobs, "put", put_later)
    monkeypatch.setattr(site.batches, "insert", insert_and_lose)
    paths = files(tmp_path, photo(), photo())
    accepted = await _call(site, lambda batch: batch.submit_batch(paths))
    assert lost == 2
    assert list(site.batches.rows) == [accepted.id]
    assert set(site.jobs.rows) == set(accepted.jobs)
    assert len(site.blobs.objects) == 2


@pytest.mark.batches
async def test_a_full_queue_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is recorded, with all its photos, as soon as the queue has room for it."""
    monkeypatch.setattr(retry, "RETRY_AFTER_S", 0)
    async with open_site(max_waiting_jobs=2) as site:
        in_the_way, insert, refused = await site.submit(), site.batches.insert, 0

        async def insert_or_make_room(*arguments: Any) -> Any:
            nonlocal refused
            try:
                return await insert(*arguments)
            except QueueFull:
                refused += 1
                await site.jobs.request_cancel(in_the_way)
                raise

        monkeypatch.setattr(site.batches, "insert", insert_or_make_room)
        paths = files(tmp_path, photo((8, 8)), photo((9, 9)))
        accepted = await _call(site, lambda batch: batch.submit_batch(paths))
        assert refused == 1
        for job_id, path in accepted.jobs.items():
            assert await site.blobs.get(site.jobs.rows[job_id].input) == path.read_bytes()


@pytest.mark.batches
async def test_a_batch_that_waited_too_long_is_not_recorded(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects without a row are deleted after half a day, so a batch is refused after half of
    that."""
    monkeypatch.setattr(rules, "PUT_TOGETHER_S", -1)
    paths = files(tmp_path, photo())
    with pytest.raises(BatchExpired):
        await _call(site, lambda batch: batch.submit_batch(paths))
    assert (site.jobs.rows, site.batches.rows) == ({}, {})


@pytest.mark.batches
async def test_nor_is_one_called_too_old_that_was_recorded(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch recorded just in time is returned by the next call, if the first answer was lost."""
    monkeypatch.setattr(retry, "RETRY_S", 0)
    insert = site.batches.insert

    async def insert_and_lose(*arguments: Any) -> Any:
        await insert(*arguments)
        monkeypatch.setattr(rules, "PUT_TOGETHER_S", -1)
        raise DependencyUnavailable("the answer is lost")

    monkeypatch.setattr(site.batches, "insert", insert_and_lose)
    paths = files(tmp_path, photo())
    accepted = await _call(site, lambda batch: batch.submit_batch(paths))
    assert list(site.batches.rows) == [accepted.id]
    assert set(site.jobs.rows) == set(accepted.jobs)


@pytest.mark.batches
async def test_a_batch_that_is_not_there(site: Site) -> None:
    """A missing batch raises BatchNotFound through the handle too."""
    with pytest.raises(BatchNotFound):
        await _call(site, lambda batch: batch.batch_status(UUID(int=0)))
