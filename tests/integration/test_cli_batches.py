"""`restore batch` against a real server."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from typer.testing import CliRunner, Result

from restoration.jobs import Artifact, JobStatus
from serve_app.cli.main import app
from tests.fakes.live_site import LiveSite, open_live_site
from tests.fakes.site import photo
from tests.support.polling import until

DEADLINE_S = 300


@pytest.fixture
async def live(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LiveSite]:
    """Run a site whose server also serves its objects."""

    async with open_live_site() as opened:

        async def signed_url(artifact: Artifact, filename: str, lifetime_s: int) -> str:
            return f"{opened.url}/blobs/{artifact.key}"

        await opened.stop()
        opened.app = ServesBlobs(opened.app, opened)
        await opened.start()
        monkeypatch.setattr(opened.site.blobs, "signed_url", signed_url)
        yield opened


class ServesBlobs:
    def __init__(self, inner: ASGIApp, live: LiveSite) -> None:
        self._inner = inner
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/blobs/"):
            data = self._live.site.blobs.objects[scope["path"].removeprefix("/blobs/")]
            return await Response(data)(scope, receive, send)
        await self._inner(scope, receive, send)


async def restore(live: LiveSite, *arguments: object) -> Result:
    """Run `restore batch ...` in a thread, because the server runs on this event loop."""
    command = ["batch", *map(str, arguments)]
    env = {"RESTORE_SERVER": live.url, "RESTORE_TOKEN": live.site.token(), "COLUMNS": "200"}
    async with asyncio.timeout(DEADLINE_S):
        return await asyncio.to_thread(lambda: CliRunner().invoke(app, command, env=env))


async def work(live: LiveSite, jobs: int, failing: int = 0) -> None:
    """Run so many jobs as a worker would, and fail the last `failing` ones."""
    async with asyncio.timeout(DEADLINE_S):
        for left in range(jobs, 0, -1):
            while not (waiting := await live.site.jobs.waiting(1)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            job = await live.site.start(waiting[0].job_id)
            if left <= failing:
                await live.site.fail(job)
            else:
                await live.site.succeed(job, f"restored {job.batch_index}".encode())


def folder(path: Path, **contents: bytes) -> Path:
    path.mkdir()
    for name, content in contents.items():
        (path / name.replace("_", ".")).write_bytes(content)
    return path


@pytest.mark.batches
async def test_a_folder_is_restored_into_another(live: LiveSite, tmp_path: Path) -> None:
    """Photos of a folder come by name, files in the given order; results are named after their
    photos."""
    scans = folder(tmp_path / "scans", b_png=photo(), a_jpg=photo(), notes_txt=b"?")
    single = folder(tmp_path / "single", a_png=photo()) / "a.png"
    results = tmp_path / "results"
    async with asyncio.TaskGroup() as group:
        group.create_task(work(live, 3))
        done = await restore(live, "submit", scans, single, "-o", results, "--format", "webp")
    assert done.exit_code == 0, done.output
    assert {path.name: path.read_text() for path in results.iterdir()} == {
        "a.webp": "restored 0",
        "b.webp": "restored 1",
        "a-2.webp": "restored 2",
    }
    assert "3 succeeded" in done.output


STRANGE_NAMES = (
    'say "hi".jpg',
    "100%22.png",
    "100%.png",
    "ü 写真 🖼.jpg",
    "a;b=c\\d.jpg",
    "new\nline.jpg",
    "[red]x[bold].jpg",
    "- .jfif",
    "noend",
    "\udcff.jpg",
)


async def test_results_are_named_exactly_as_their_photos(live: LiveSite, tmp_path: Path) -> None:
    """Results keep unusual file names, also those that are not valid text."""
    scans, results = folder(tmp_path / "scans"), tmp_path / "results"
    for name in STRANGE_NAMES:
        (scans / name).write_bytes(photo())
    async with asyncio.TaskGroup() as group:
        group.create_task(work(live, len(STRANGE_NAMES)))
        done = await restore(live, "submit", scans, "-o", results)
    assert done.exit_code == 0, done.output
    wanted = {Path(name).with_suffix(".png").name for name in STRANGE_NAMES}
    assert {path.name for path in results.iterdir()} == wanted
    [batch_id] = live.site.batches.rows
    names = {item.name for item in await live.site.batches.items(batch_id)}
    assert set(STRANGE_NAMES[:5]) <= names


async def test_folders_in_folders_are_restored_into_alike_ones(
    live: LiveSite, tmp_path: Path
) -> None:
    """A later `wait` restores the folders too, because the service knows the photos' paths."""
    scans, results, later = folder(tmp_path / "scans"), tmp_path / "results", tmp_path / "later"
    for name in ("1.jpg", "a/1.jpg", "a/1.png", "a/b/1.jpg", "c d/1.jpg"):
        (scans / name).parent.mkdir(parents=True, exist_ok=True)
        (scans / name).write_bytes(photo())
    async with asyncio.TaskGroup() as group:
        group.create_task(work(live, 5))
        done = await restore(live, "submit", "--recursive", scans, "-o", results)
    assert done.exit_code == 0, done.output
    [batch_id] = live.site.batches.rows
    assert (await restore(live, "wait", batch_id, "-o", later)).exit_code == 0
    for restored in (results, later):
        assert {
            str(path.relative_to(restored)): path.read_text() for path in restored.rglob("*.png")
        } == {
            "1.png": "restored 0",
            "a/1.png": "restored 1",
            "a/1-2.png": "restored 2",
            "a/b/1.png": "restored 3",
            "c d/1.png": "restored 4",
        }


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", "..", "/", "//x.jpg"])
async def test_a_photos_name_never_leads_out_of_the_results(
    live: LiveSite, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo())
    results = tmp_path / "deep" / "results"
    async with asyncio.TaskGroup() as group:
        group.create_task(work(live, 1))
        batch = await live.call(lambda client: client.submit_batch([path], names=[name]))
        done = await restore(live, "wait", batch.id, "-o", results)
    assert done.exit_code == 0, done.output
    files = [Path(root) / name for root, _, names in os.walk(tmp_path) for name in names]
    assert len(files) == 2
    assert all(each == path or each.is_relative_to(results) for each in files)


async def test_what_was_left_out_of_a_folder_is_said(live: LiveSite, tmp_path: Path) -> None:
    scans = folder(tmp_path / "scans", a_bin=photo(), notes_txt=b"?")
    (scans / "._a.jpg").write_bytes(b"\x00\x05\x16\x07")
    (scans / "more").mkdir()
    async with asyncio.TaskGroup() as group:
        group.create_task(work(live, 1))
        done = await restore(live, "submit", scans)
    assert done.exit_code == 0, done.output
    assert "skipped 1, hidden: ._a.jpg" in done.output
    assert "skipped 1, not images of a supported type: notes.txt" in done.output
    assert "skipped 1, subfolders, which need --recursive: more" in done.output


@pytest.mark.batches
async def test_no_file_is_overwritten(live: LiveSite, tmp_path: Path) -> None:
    """Results beside photos with clashing names overwrite nothing."""
    scans = folder(tmp_path / "scans")
    names = ("IMG-2.jpg", "IMG-3.jpg", "IMG.jpg", "IMG.png", "Z.png")
    for name in names:
        (scans / name).write_bytes(photo())
    async with asyncio.TaskGroup() as group:
        group.create_task(work(live, 5))
        done = await restore(live, "submit", scans, "-o", scans)
    assert done.exit_code == 0, done.output
    assert [(scans / name).read_bytes() for name in names] == [photo()] * 5
    results = [path.read_text() for path in scans.iterdir() if path.name not in names]
    assert sorted(results) == [f"restored {index}" for index in range(5)]


@pytest.mark.batches
async def test_every_photo_that_failed_is_told(live: LiveSite, tmp_path: Path) -> None:
    """The exit status is 1, with a line for each photo without a result, and the other results."""
    scans = folder(tmp_path / "scans", a_png=photo(), b_png=b"broken", c_png=photo())
    results = tmp_path / "results"
    async with asyncio.TaskGroup() as group:
        group.create_task(work(live, 2, failing=1))
        done = await restore(live, "submit", scans, "-o", results)
    assert done.exit_code == 1
    assert "error: b.png: refused: the file is not an image" in done.output
    assert "error: c.png: failed: a node raised [engine_failed]" in done.output
    assert "partly_failed: 1 succeeded, 1 failed, 1 refused" in done.output
    assert [path.name for path in results.iterdir()] == ["a.png"]


@pytest.mark.batches
async def test_a_result_that_cannot_be_had_is_told(live: LiveSite, tmp_path: Path) -> None:
    """A damaged download leaves no file and fails the command."""
    scans = folder(tmp_path / "scans", a_png=photo(), b_png=photo())
    async with asyncio.TaskGroup() as group:
        group.create_task(work(live, 2))
        assert (await restore(live, "submit", scans)).exit_code == 0
    [batch_id] = live.site.batches.rows
    first, _ = await live.site.batches.items(batch_id)
    live.site.blobs.objects[f"out/{first.job_id}"] = b"damaged"
    results = tmp_path / "results"
    done = await restore(live, "wait", batch_id, "-o", results)
    assert done.exit_code == 1
    assert "error: a.png: the result was damaged in transit" in done.output
    assert [path.name for path in results.iterdir()] == ["b.png"]


@pytest.mark.batches
async def test_batches_are_shown_listed_and_cancelled(live: LiveSite, tmp_path: Path) -> None:
    """`show` prints JSON with every photo, `list` a line per batch, and `cancel` waits."""
    scans = folder(tmp_path / "scans", a_png=photo(), b_png=photo())
    async with asyncio.TaskGroup() as group:
        submitting = group.create_task(restore(live, "submit", scans))
        await until(lambda: live.site.batches.rows)
        [batch_id] = live.site.batches.rows
        shown = json.loads((await restore(live, "show", batch_id)).stdout)
        assert (UUID(shown["id"]), shown["status"]) == (batch_id, "running")
        assert [item["name"] for item in shown["items"]] == ["a.png", "b.png"]
        assert str(batch_id) in (await restore(live, "list")).stdout
        cancelled = await restore(live, "cancel", batch_id)
    assert cancelled.exit_code == 0
    assert "2 cancelled" in cancelled.output
    assert submitting.result().exit_code == 1
    assert {job.status for job in live.site.jobs.rows.values()} == {JobStatus.CANCELLED}


@pytest.mark.batches
async def test_no_photos_are_no_batch(live: LiveSite, tmp_path: Path) -> None:
    """An empty folder is a usage error, and so are more photos than a batch holds."""
    empty = folder(tmp_path / "empty")
    done = await restore(live, "submit", empty)
    assert done.exit_code == 2
    many = folder(tmp_path / "many", **{f"p{n}_png": b"" for n in range(1001)})
    done = await restore(live, "submit", many)
    assert done.exit_code == 2
    assert "found 1001 photos" in done.output
    assert live.site.batches.rows == {}
