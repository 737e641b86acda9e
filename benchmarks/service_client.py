"""A client that uses every feature of the service: token, Postgres, S3 both ways, events."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import sklearn
from PIL import Image

from benchmarks.bare_client import Work
from benchmarks.figures import HERE
from restoration.jobs import OutputFormat
from serve_app.local.temporary import LocalStack
from workflows.catalog import load_catalog
from workflows.render import render

WORKFLOW = "held"
WAIT_S = 60
POLL_S = 0.25
_API = "/api/v1/restorations"

PhotoName = Literal["china", "flower"]
_PHOTOS = Path(sklearn.__file__).parent / "datasets" / "images"


@dataclass(frozen=True, slots=True)
class Held:
    """Jobs with a square result of `side` pixels that hold the GPU for `seconds` each."""

    side: int
    seconds: float
    jobs: int

    @property
    def params(self) -> dict[str, float]:
        return {"size": self.side, "seconds": self.seconds}

    def photo(self, name: PhotoName = "china") -> bytes:
        out = io.BytesIO()
        side = self.side // 4
        original(name).resize((side, side), Image.Resampling.LANCZOS).save(out, "JPEG")
        return out.getvalue()

    def work(self) -> Work:
        workflow = load_catalog(more=HERE / "workflows").find(WORKFLOW)
        prompt = render(workflow, workflow.resolve(self.params), "photo", "result")
        return Work(self.photo(), prompt, "photo", "result")


def original(name: PhotoName) -> Image.Image:
    """Return one of the photos of scikit-learn's wheel."""
    with Image.open(_PHOTOS / f"{name}.jpg") as photo:
        return photo.convert("RGB")


class NoAnswer(Exception):
    """The service reported that the job did not succeed."""


class ServiceClient:
    """Submits jobs, waits for them and fetches results over HTTP."""

    def __init__(self, http: aiohttp.ClientSession, url: str, token: str) -> None:
        self._http = http
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}"}

    @classmethod
    @asynccontextmanager
    async def to(
        cls, stack: LocalStack, owner: str = "bench", connections: int = 100
    ) -> AsyncIterator[ServiceClient]:
        connector = aiohttp.TCPConnector(limit=connections)
        async with aiohttp.ClientSession(connector=connector) as http:
            yield cls(http, stack.record.url, stack.token(owner))

    async def end_times_s(
        self, held: Held, in_flight: int, *, redirected: bool = True
    ) -> list[float]:
        """Return when each result arrived, like the bare client. Large results are fetched from S3
        itself (`redirected`); small ones come sooner in the answer to their submission."""
        left, photo, ended_at_s = iter(range(held.jobs)), held.photo(), list[float]()

        async def work_off() -> None:
            for _ in left:
                await (self.restore(held, photo) if redirected else self._answered(held, photo))
                ended_at_s.append(time.monotonic())

        await asyncio.gather(*(work_off() for _ in range(in_flight)))
        return ended_at_s

    async def restore(
        self, held: Held, photo: bytes, output_format: OutputFormat = OutputFormat.PNG
    ) -> bytes:
        """Run one job, and return its result."""
        path = await self.run(WORKFLOW, held.params, photo, output_format)
        return await self._fetch(path)

    async def run(
        self,
        workflow: str,
        params: Mapping[str, object],
        photo: bytes,
        output_format: OutputFormat = OutputFormat.PNG,
    ) -> str:
        """Submit a job, wait for its end, and return the path of its result.

        Raises NoAnswer if it did not succeed.
        """
        job = await self.submit(workflow, params, photo, WAIT_S, output_format)
        await self.ended([job])
        path: str = job["links"]["result"]
        return path

    async def submit(
        self,
        workflow: str,
        params: Mapping[str, object],
        photo: bytes,
        wait_s: int = 0,
        output_format: OutputFormat = OutputFormat.PNG,
    ) -> dict[str, Any]:
        """Submit a job, and return its state after at most `wait_s` seconds."""
        form = _form(workflow, params, photo, output_format)
        headers = {**self._headers, **({"Prefer": f"wait={wait_s}"} if wait_s else {})}
        async with self._http.post(self._url + _API, data=form, headers=headers) as answer:
            answer.raise_for_status()
            job: dict[str, Any] = await answer.json()
            return job

    async def _answered(self, held: Held, photo: bytes) -> bytes:
        """Submit a job, and return the result from the same answer.

        Raises NoAnswer if it did not succeed.
        """
        form = _form(WORKFLOW, held.params, photo, OutputFormat.PNG)
        headers = {**self._headers, "Prefer": f"wait={WAIT_S}", "Accept": "image/png"}
        async with self._http.post(self._url + _API, data=form, headers=headers) as answer:
            if answer.content_type != "image/png":
                raise NoAnswer(await answer.text())
            return await answer.read()

    async def ended(self, jobs: Iterable[Mapping[str, Any]]) -> None:
        """Wait until all jobs have ended, with few requests to leave the cores to the workers.

        Raises NoAnswer if one did not succeed.
        """
        for job in jobs:
            now = job
            while now["status"] in {"queued", "running"}:
                now = await self.read(job)
                if now["status"] in {"queued", "running"}:
                    await asyncio.sleep(POLL_S)
            if now["status"] != "succeeded":
                raise NoAnswer(now)

    async def read(self, job: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the current state of the job."""
        url = self._url + job["links"]["self"]
        async with self._http.get(url, headers=self._headers) as answer:
            answer.raise_for_status()
            now: dict[str, Any] = await answer.json()
            return now

    async def _fetch(self, path: str) -> bytes:
        url = self._url + path
        redirect = self._http.get(url, headers=self._headers, allow_redirects=False)
        async with redirect as answer:
            signed = answer.headers["location"]
        async with self._http.get(signed) as answer:
            answer.raise_for_status()
            return await answer.read()


def _form(
    workflow: str, params: Mapping[str, object], photo: bytes, output_format: OutputFormat
) -> aiohttp.FormData:
    asked = {"workflow": workflow, "params": json.dumps(params)}
    form = aiohttp.FormData({**asked, "output_format": output_format.value})
    form.add_field("image", photo, filename="photo.jpg")
    return form
