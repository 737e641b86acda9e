"""Clients generated from the OpenAPI document by others' tools submit, wait and download."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from restoration.jobs import JobStatus
from tests.fakes.live_site import LiveSite, open_live_site
from tests.fakes.site import photo

pytestmark = pytest.mark.registries
GENERATORS = Path(__file__).parent.parent / "generators"
DEADLINE_S = 400  # to fetch, install and run a generator on a busy machine
PHOTOS = {'say "hi".png': (8, 8), "ü 50%.png": (9, 7), "c.png": (5, 5)}


@asynccontextmanager
async def served() -> AsyncIterator[LiveSite]:
    """Run a service with a worker whose result names the job's workflow and the photo's size."""
    async with open_live_site() as live:
        working = asyncio.create_task(_work(live))
        try:
            yield live
        finally:
            working.cancel()


async def _work(live: LiveSite) -> None:
    names = [workflow.name for workflow in live.site.services.catalog]
    while True:
        job = await live.site.jobs.claim("worker-1", 60, names)
        if job is None:
            await asyncio.sleep(0.02)
        else:
            await live.site.succeed(job, f"{job.workflow} {job.input.size_bytes}".encode())


async def run(folder: Path, *command: str | Path) -> None:
    environment = {**os.environ, "NO_COLOR": "1", "NO_PROXY": "127.0.0.1"}
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, f"{command}\n{output.decode(errors='replace')}"


async def demand_restored(live: LiveSite, folder: Path, command: Sequence[str | Path]) -> None:
    """Run the client in `folder` on three photos, and check its submissions and downloads."""
    output = folder / "output"
    output.mkdir()
    photos = [folder / name for name in PHOTOS]
    for path in photos:
        path.write_bytes(photo(PHOTOS[path.name]))
    await run(folder, *command, live.url, live.site.token(), output, *photos)
    single, *batch = sorted(live.site.jobs.rows.values(), key=lambda job: job.created_at)
    assert (single.workflow, single.options.keep_metadata) == ("restore", True)
    assert {(job.workflow, job.params["scale"], job.options.run_limit_s) for job in batch} == {
        ("enlarge", 2, 60.0)
    }
    assert {job.status for job in (single, *batch)} == {JobStatus.SUCCEEDED}
    sizes = {path.name: path.stat().st_size for path in photos}
    assert {path.name: path.read_text() for path in output.iterdir()} == {
        "one": f"restore {sizes[photos[0].name]}",
        **{name: f"enlarge {size}" for name, size in sizes.items()},
    }


async def write_document(live: LiveSite, folder: Path) -> Path:
    async with live.site.client(sub=None) as client:
        document = (await client.get("/openapi.json")).json()
    path = folder / "openapi.json"
    path.write_text(json.dumps(document))
    return path


async def test_a_python_client_that_is_generated_restores_photos(tmp_path: Path) -> None:
    uv, environment = [sys.executable, "-m", "uv"], tmp_path / "venv"
    await run(tmp_path, *uv, "venv", "--quiet", "--python", sys.executable, environment)
    python, generator = environment / "bin" / "python", environment / "bin/openapi-python-client"
    wanted = GENERATORS / "requirements.txt"
    await run(tmp_path, *uv, "pip", "install", "--quiet", "--python", python, "-r", wanted)
    async with served() as live:
        document = await write_document(live, tmp_path)
        into = tmp_path / "client"
        await run(
            tmp_path,
            generator,
            "generate",
            "--path",
            document,
            "--output-path",
            into,
            "--meta",
            "none",
        )
        shutil.copy(GENERATORS / "submit.py", tmp_path)
        await demand_restored(live, tmp_path, [python, "submit.py"])


@pytest.mark.skipif(
    shutil.which("npm") is None, reason="npm is not installed; CI generates this client"
)
async def test_a_typescript_client_that_is_generated_restores_photos(tmp_path: Path) -> None:
    """The TypeScript compiler checks the types that the document defines."""
    for name in ("package.json", "package-lock.json", "submit.ts"):
        shutil.copy(GENERATORS / name, tmp_path)
    await run(tmp_path, "npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts")
    tools = tmp_path / "node_modules/.bin"
    async with served() as live:
        document = await write_document(live, tmp_path)
        await run(tmp_path, tools / "openapi-ts", "-i", document, "-o", "client")
        target = ["--target", "es2022", "--lib", "es2022,dom,dom.iterable", "--strict"]
        modules = ["--module", "commonjs", "--moduleResolution", "node10", "--skipLibCheck"]
        await run(tmp_path, tools / "tsc", *target, *modules, "submit.ts")
        await demand_restored(live, tmp_path, ["node", "submit.js"])
