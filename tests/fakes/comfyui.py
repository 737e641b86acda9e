"""A fake ComfyUI: a real local server that can be scripted to fail in ways the real one will not.

It speaks the protocol of ComfyUI 0.3.75, runs LoadImage, EmptyImage, SaveImage and the nodes of
tests/fakes/nodes, and counts requests. Run as a program, it takes ComfyUI's command line, so that
it can be an owned engine. Tests against its default behaviour also run against ComfyUI.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import BodyPartReader, WSMsgType, web

from tests.fakes.comfyui_worker import NODES, Item, Script, Worker, write

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeComfyUI:
    """A fake server. `calls` counts requests as "METHOD /first-part-of-the-path"."""

    def __init__(self, base_dir: Path, script: Script) -> None:
        self.script = script
        self.calls: collections.Counter[str] = collections.Counter()
        self.log: list[str] = []  # "hello CLIENT", "prompt ID of CLIENT"
        self.client_ids: list[str] = []
        self.url = ""
        self.worker = Worker(base_dir, script, self._deliver, self.drop_sockets)
        self._base_dir = base_dir
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._transports: list[asyncio.Transport] = []
        self._refused: collections.Counter[str] = collections.Counter()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._misbehave], client_max_size=100 << 20)
        app.add_routes(
            [
                web.get("/ws", self._websocket),
                web.get("/system_stats", self._system_stats),
                web.get("/object_info", self._object_info),
                web.post("/upload/image", self._upload),
                web.post("/prompt", self._prompt),
                web.get("/history", self._all_history),
                web.get("/history/{id}", self._one_history),
                web.post("/history", self._delete_history),
                web.get("/queue", self._queue),
                web.post("/queue", self._delete_queued),
                web.post("/interrupt", self._interrupt),
                web.get("/view", self._view),
            ]
        )
        return app

    def drop_sockets(self) -> None:
        """Abort all websockets without a closing frame, as a network failure does."""
        for transport in self._transports:
            transport.abort()
        self._transports.clear()
        self._sockets.clear()

    @web.middleware
    async def _misbehave(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        path = "/" + request.path.split("/")[1]
        self.calls[f"{request.method} {path}"] += 1
        if path in self.script.hang:
            await asyncio.get_running_loop().create_future()
        if self._refused[path] < self.script.refuse.get(path, 0):
            self._refused[path] += 1
            return web.Response(status=500)
        return await handler(request)

    async def _websocket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        client_id = request.query["clientId"]
        self.client_ids.append(client_id)
        assert request.transport is not None
        self._transports.append(request.transport)
        await asyncio.sleep(self.script.hello_delay_s)
        self._sockets[client_id] = socket
        self.log.append(f"hello {client_id}")
        await socket.send_json({"type": "status", "data": {"status": {}, "sid": client_id}})
        async for message in socket:
            assert message.type is WSMsgType.TEXT
            assert json.loads(message.data)["type"] == "feature_flags"
        self._sockets.pop(client_id, None)
        return socket

    async def _deliver(self, client_id: str, frame: str | bytes) -> None:
        if (socket := self._sockets.get(client_id)) is None:
            return
        with contextlib.suppress(ConnectionError):
            await (socket.send_str(frame) if isinstance(frame, str) else socket.send_bytes(frame))

    async def _system_stats(self, _: web.Request) -> web.Response:
        return web.json_response({"system": {"comfyui_version": "fake"}, "devices": []})

    async def _object_info(self, _: web.Request) -> web.Response:
        return web.json_response({name: {} for name in NODES})

    async def _upload(self, request: web.Request) -> web.Response:
        name, subfolder, data = "", "", b""
        async for part in await request.multipart():
            assert isinstance(part, BodyPartReader)
            if part.name == "image":
                name, data = part.filename or "", bytes(await part.read())
            elif part.name == "subfolder":
                subfolder = await part.text()
        if self.script.rename_uploads:
            name = f"renamed {name}"
        await asyncio.to_thread(write, self._base_dir / "input" / subfolder / name, data)
        return web.json_response({"name": name, "subfolder": subfolder, "type": "input"})

    async def _prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        for node_id, node in body["prompt"].items():
            if node["class_type"] not in NODES:
                message = f"Cannot execute because node {node['class_type']} does not exist."
                error = {"type": "invalid_prompt", "message": message, "details": f"#{node_id}"}
                return web.json_response({"error": error, "node_errors": {}}, status=400)
        item = Item(body["prompt_id"], body["client_id"], body["prompt"])
        self.log.append(f"prompt {item.prompt_id} of {item.client_id}")
        if not self.script.forget:
            self.worker.put(item)
        answer: dict[str, Any] = {"prompt_id": item.prompt_id, "number": 0}
        return web.json_response({**answer, "node_errors": self.script.node_errors})

    async def _all_history(self, _: web.Request) -> web.Response:
        return web.json_response(self.worker.history)

    async def _one_history(self, request: web.Request) -> web.Response:
        return web.json_response(self.worker.history_of(request.match_info["id"]))

    async def _delete_history(self, request: web.Request) -> web.Response:
        for prompt_id in (await request.json())["delete"]:
            self.worker.history.pop(prompt_id, None)
        return web.Response()

    async def _queue(self, _: web.Request) -> web.Response:
        running = [self.worker.running.wire()] if self.worker.running else []
        pending = [item.wire() for item in self.worker.pending]
        return web.json_response({"queue_running": running, "queue_pending": pending})

    async def _delete_queued(self, request: web.Request) -> web.Response:
        self.worker.dequeue((await request.json())["delete"])
        return web.Response()

    async def _interrupt(self, request: web.Request) -> web.Response:
        self.worker.interrupt((await request.json())["prompt_id"])
        return web.Response()

    async def _view(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        path = self._base_dir / query["type"] / query["subfolder"] / query["filename"]
        try:
            return web.Response(body=await asyncio.to_thread(path.read_bytes))
        except FileNotFoundError:
            return web.Response(status=404)


@asynccontextmanager
async def serving(
    base_dir: Path, script: Script | None = None, port: int = 0
) -> AsyncIterator[FakeComfyUI]:
    """Serve a fake on 127.0.0.1; on exit it ends like a killed process, in the middle of
    everything."""
    fake = FakeComfyUI(base_dir, script or Script())
    runner = web.AppRunner(fake.app(), handler_cancellation=True, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    working = asyncio.create_task(fake.worker.work())
    try:
        yield fake
    finally:
        working.cancel()
        await asyncio.wait({working})
        fake.drop_sockets()
        await runner.cleanup()


async def _serve_for_ever(base_dir: Path, port: int) -> None:
    async with serving(base_dir, port=port):
        await asyncio.get_running_loop().create_future()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--base-directory", type=Path, required=True)
    arguments, _ = parser.parse_known_args()  # ignore ComfyUI's other options
    asyncio.run(_serve_for_ever(arguments.base_directory, arguments.port))


if __name__ == "__main__":
    main()
