"""Typed client of ComfyUI's HTTP API: aiohttp for transport, `responses` for decoding.

Converts aiohttp's errors; `websocket` does the same for websocket-client's. A failed connection, a
timeout and a 5xx status raise EngineUnavailable; any other error status raises EngineFailed.
"""

from __future__ import annotations

import asyncio
import math
import time
from functools import cached_property
from http import HTTPStatus
from typing import Any

import aiohttp

from comfy_pool.protocol import responses
from restoration.engine_port import Prompt
from restoration.errors import EngineFailed, EngineUnavailable

_CONNECT_S = 5.0


class ComfyClient:
    """Client of the engine at `base_url` (http or https).

    `answer_s` is the read timeout in seconds. Close the client with `aclose`.
    """

    def __init__(self, base_url: str, *, answer_s: float = 30.0) -> None:
        self.base_url = base_url.rstrip("/")
        self._answer_s = answer_s
        self._answered_at = -math.inf

    @cached_property
    def _http(self) -> aiohttp.ClientSession:
        """The session, created on first use because it belongs to the running event loop."""
        # No total timeout: a large picture may take long. Only silence counts.
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_S, sock_read=self._answer_s
        )
        return aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar())

    async def aclose(self) -> None:
        await self._http.close()

    def responded_within(self, seconds: float) -> bool:
        """Return whether the engine answered in the last `seconds` and no call failed since."""
        return time.monotonic() - self._answered_at < seconds

    async def responds(self, timeout_s: float) -> bool:
        """Return whether the engine answers GET /system_stats within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._call("GET", "/system_stats")
        except (TimeoutError, EngineUnavailable, EngineFailed):
            self._answered_at = -math.inf  # `_call` does not see this timeout
            return False
        return True

    async def system_stats(self) -> responses.SystemStats:
        """Return ComfyUI's version and the memory of its GPU."""
        return responses.parse_system_stats(await self._call("GET", "/system_stats"))

    async def node_classes(self) -> frozenset[str]:
        """Return the class names of the engine's nodes."""
        body = await self._call("GET", "/object_info")
        return await asyncio.to_thread(responses.parse_node_classes, body)  # megabytes of JSON

    async def upload(self, image: bytes, filename: str, folder: str) -> str:
        """Store a picture in `folder` of the engine's input. Return its name for LoadImage."""
        form = aiohttp.FormData({"subfolder": folder})
        form.add_field("image", image, filename=filename)
        return responses.parse_upload(await self._call("POST", "/upload/image", data=form))

    async def submit(
        self, prompt: Prompt, prompt_id: str, client_id: str
    ) -> responses.PromptAnswer:
        """Queue a prompt, whose events go to the websocket of `client_id`."""
        body = await self._call(
            "POST",
            "/prompt",
            also=HTTPStatus.BAD_REQUEST,
            json={"prompt": prompt, "prompt_id": prompt_id, "client_id": client_id},
        )
        return responses.parse_prompt_answer(body)

    async def history(self, prompt_id: str) -> responses.HistoryEntry | None:
        """Return the history entry, or None if the prompt has not ended or is unknown."""
        body = await self._call("GET", f"/history/{prompt_id}")
        return responses.parse_history(body, prompt_id)

    async def forget(self, prompt_id: str) -> None:
        """Delete the history entry, if there is one."""
        await self._call("POST", "/history", json={"delete": [prompt_id]})

    async def queue(self) -> responses.Queue:
        """Return the ids of the running and pending prompts."""
        return responses.parse_queue(await self._call("GET", "/queue"))

    async def dequeue(self, prompt_id: str) -> None:
        """Remove a prompt from the queue. Ignored if it is running or unknown."""
        await self._call("POST", "/queue", json={"delete": [prompt_id]})

    async def interrupt(self, prompt_id: str) -> None:
        """Interrupt the prompt if it is running. ComfyUI does not report whether it was."""
        await self._call("POST", "/interrupt", json={"prompt_id": prompt_id})

    async def view(self, image: responses.OutputImage) -> bytes:
        """Return the bytes of a saved file."""
        where = {"filename": image.filename, "subfolder": image.subfolder, "type": image.type}
        return await self._call("GET", "/view", params=where)

    async def _call(
        self, method: str, path: str, *, also: HTTPStatus = HTTPStatus.OK, **request: Any
    ) -> bytes:
        """Return the response body if the status is 200 or `also`."""
        what, url = f"{method} {path}", self.base_url + path
        try:
            async with self._http.request(method, url, allow_redirects=False, **request) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError
            self._answered_at = -math.inf
            reason = str(error) or type(error).__name__
            raise EngineUnavailable(f"no response from ComfyUI to {what}: {reason}") from error
        self._answered_at = time.monotonic()
        if answer.status in (HTTPStatus.OK, also):
            return body
        refusal = f"ComfyUI responded to {what} with status {answer.status}"
        if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise EngineUnavailable(refusal)
        raise EngineFailed(refusal)
