"""A bare client that keeps one ComfyUI busy, the baseline that the service is compared with.

Each job is uploaded, queued, followed over the websocket and fetched, without a queue of its own, a
database or retries. ComfyUI's queue never runs empty, because several jobs are in flight.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

IN_FLIGHT = 4  # one executes, one waits, the others are being sent or fetched


@dataclass(frozen=True, slots=True)
class Work:
    """The job to repeat. `prompt` is a graph in ComfyUI's API format."""

    photo: bytes
    prompt: Mapping[str, Mapping[str, Any]]
    image_node: str
    output_node: str


async def end_times_s(url: str, work: Work, jobs: int, in_flight: int = IN_FLIGHT) -> list[float]:
    """Run `jobs` jobs, and return when each result arrived, in order, by the monotonic clock."""
    client_id = uuid.uuid4().hex
    async with aiohttp.ClientSession(base_url=url) as http:
        async with http.ws_connect("/ws", params={"clientId": client_id}, max_msg_size=0) as socket:
            await socket.receive()  # After this greeting no event is missed.
            client = _Client(http, client_id, work)
            listening = asyncio.create_task(client.listen(socket))
            try:
                left = iter(range(jobs))
                await asyncio.gather(*(client.work_off(left) for _ in range(in_flight)))
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
            return client.ended_at_s


class _Client:
    def __init__(self, http: aiohttp.ClientSession, client_id: str, work: Work) -> None:
        self._http = http
        self._client_id = client_id
        self._work = work
        self._over: dict[str, asyncio.Event] = {}
        self.ended_at_s: list[float] = []

    async def listen(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            data = event.get("data", {})
            # The prompt is in the history only after this event.
            if event["type"] == "executing" and data.get("node") is None:
                self._over[data["prompt_id"]].set()

    async def work_off(self, left: Any) -> None:
        for _ in left:
            await self._run()
            self.ended_at_s.append(time.monotonic())

    async def _run(self) -> bytes:
        prompt_id = str(uuid.uuid4())
        over = self._over[prompt_id] = asyncio.Event()
        name = await self._upload(prompt_id)
        await self._submit(prompt_id, name)
        await over.wait()
        async with self._http.get(f"/history/{prompt_id}") as answer:
            outputs = (await answer.json())[prompt_id]["outputs"]
        saved = outputs[self._work.output_node]["images"][0]
        async with self._http.get("/view", params=saved) as answer:
            return await answer.read()

    async def _upload(self, prompt_id: str) -> str:
        form = aiohttp.FormData({"subfolder": prompt_id})
        form.add_field("image", self._work.photo, filename="photo")
        async with self._http.post("/upload/image", data=form) as answer:
            uploaded = await answer.json()
        return f"{uploaded['subfolder']}/{uploaded['name']}"

    async def _submit(self, prompt_id: str, name: str) -> None:
        prompt = {node: dict(part) for node, part in self._work.prompt.items()}
        for node, values in (
            (self._work.image_node, {"image": name}),
            (self._work.output_node, {"filename_prefix": f"{prompt_id}/result"}),
        ):
            prompt[node]["inputs"] = {**prompt[node]["inputs"], **values}
        body = {"prompt": prompt, "prompt_id": prompt_id, "client_id": self._client_id}
        async with self._http.post("/prompt", json=body) as answer:
            answer.raise_for_status()
