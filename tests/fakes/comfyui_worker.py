"""Prompt execution of the fake ComfyUI: one prompt after another, with an event for each step.

Events, history and queue follow the order of ComfyUI's prompt_worker; `Script` adds failures.
"""

from __future__ import annotations

import asyncio
import collections
import io
import json
import os
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

# `comfy_pool.nodes.FOLDER_VARIABLE`; the node pack itself can be imported inside ComfyUI only.
PIXELS_VARIABLE = "COMFY_RESTORE_PIXELS"


NODES = (
    "LoadImage",
    "EmptyImage",
    "SaveImage",
    "ComfyRestoreHandOver",
    "ImageScaleBy",  # keeps the size that the picture already has
    "TestSteps",
    "TestHold",
    "TestRaise",
)

Graph = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Script:
    """The scripted failures. By default there are none."""

    hello_delay_s: float = 0.0  # after a websocket connects
    drop_sockets_at: str = ""  # the type of the event at which all sockets are dropped instead
    hang: frozenset[str] = frozenset()  # paths that are never answered
    refuse: Mapping[str, int] = field(default_factory=dict)  # path: how many 500s come first
    noise: bool = False  # send frames outside the protocol between the others
    plain_previews: bool = False  # without metadata, as in older versions
    rename_uploads: bool = False  # as ComfyUI does for a name that is taken
    node_errors: Mapping[str, Any] = field(default_factory=dict)  # partial validation errors
    begin_nothing: bool = False  # as when ComfyUI's execution thread has died
    forget: bool = False  # accept prompts and forget them
    history_delay_s: float = 0.0  # between execution_success and the entry
    history_misses: int = 0  # reads of a finished prompt's history that find nothing
    ignore_interrupts: int = 0  # how many interrupts are lost
    interrupt_unasked: bool = False  # another client interrupts
    status_str: str = ""  # overrides the status of every history entry


@dataclass(eq=False)
class Item:
    prompt_id: str
    client_id: str
    graph: Graph

    def wire(self) -> list[Any]:
        """Return the item as GET /queue shows it."""
        return [0, self.prompt_id, self.graph, {"client_id": self.client_id}, []]


class _Interrupted(Exception):
    pass


class _NodeFailed(Exception):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def told_of(self, item: Item, node_id: str) -> dict[str, Any]:
        return {
            "prompt_id": item.prompt_id,
            "node_id": node_id,
            "node_type": item.graph[node_id]["class_type"],
            "exception_type": self.kind,
            "exception_message": f"{self}\n",
        }


class Worker:
    """ComfyUI's queue, history and execution thread. `deliver` sends a frame to a client."""

    def __init__(
        self,
        base_dir: Path,
        script: Script,
        deliver: Callable[[str, str | bytes], Awaitable[None]],
        drop_sockets: Callable[[], None],
    ) -> None:
        self.script = script
        self.history: dict[str, Any] = {}
        self.pending: list[Item] = []
        self.running: Item | None = None
        self.sent: list[str] = []  # the type of each event
        self._base_dir = base_dir
        self._deliver = deliver
        self._drop_sockets = drop_sockets
        self._arrived = asyncio.Event()
        self._interrupt = False
        self._interrupts_lost = 0
        self._misses: collections.Counter[str] = collections.Counter()

    def put(self, item: Item) -> None:
        self.pending.append(item)
        self._arrived.set()

    def dequeue(self, prompt_ids: list[str]) -> None:
        self.pending = [item for item in self.pending if item.prompt_id not in prompt_ids]

    def interrupt(self, prompt_id: str) -> None:
        if self.running is None or self.running.prompt_id != prompt_id:
            return
        if self._interrupts_lost < self.script.ignore_interrupts:
            self._interrupts_lost += 1
        else:
            self._interrupt = True

    def history_of(self, prompt_id: str) -> dict[str, Any]:
        found = prompt_id in self.history
        if found and self._misses[prompt_id] < self.script.history_misses:
            self._misses[prompt_id] += 1
            found = False
        return {prompt_id: self.history[prompt_id]} if found else {}

    async def work(self) -> None:
        """Run prompts one after another, endlessly."""
        while True:
            self._arrived.clear()
            while self.pending and not self.script.begin_nothing:
                self.running = self.pending.pop(0)
                await self._execute(self.running)
            await self._arrived.wait()

    async def _execute(self, item: Item) -> None:
        self._interrupt = self.script.interrupt_unasked
        messages: list[Any] = []
        outputs: dict[str, Any] = {}
        await self._send(item, "execution_start")
        await self._send(item, "execution_cached", nodes=[])
        node_id = ""
        try:
            for node_id in item.graph:
                await self._run_node(item, node_id, outputs)
            messages.append(["execution_success", {"prompt_id": item.prompt_id}])
        except _Interrupted:
            messages.append(["execution_interrupted", {"node_id": node_id}])
        except _NodeFailed as failure:
            messages.append(["execution_error", failure.told_of(item, node_id)])
        await self._send(item, messages[-1][0], **messages[-1][1])
        await asyncio.sleep(self.script.history_delay_s)
        success = messages[-1][0] == "execution_success"
        status_str = self.script.status_str or ("success" if success else "error")
        status = {"status_str": status_str, "completed": success, "messages": messages}
        self.history[item.prompt_id] = {"prompt": [], "outputs": outputs, "status": status}
        self.running = None
        await self._send(item, "executing", node=None)

    async def _run_node(self, item: Item, node_id: str, outputs: dict[str, Any]) -> None:
        self._stop_here()
        await self._send(item, "executing", node=node_id)
        inputs = item.graph[node_id]["inputs"]
        match item.graph[node_id]["class_type"]:
            case "TestSteps":
                await self._run_steps(item, node_id, inputs)
            case "TestHold":
                await asyncio.sleep(inputs["seconds"])
            case "TestRaise":
                out_of_memory = inputs["kind"] == "out_of_memory"
                kind = "torch.OutOfMemoryError" if out_of_memory else "RuntimeError"
                raise _NodeFailed(kind, inputs["message"])
            case "SaveImage":
                images = await asyncio.to_thread(self._save, item.graph, inputs)
                outputs[node_id] = {"images": images}
            case "ComfyRestoreHandOver":
                told = await asyncio.to_thread(_hand_over, inputs, self._drawn(item.graph, inputs))
                outputs[node_id] = {"pixels": [told]}
        if node_id in outputs:
            await self._send(item, "executed", node=node_id, output=outputs[node_id])
        await self._send_state(item, node_id, 1, 1, "finished")

    async def _run_steps(self, item: Item, node_id: str, inputs: Mapping[str, Any]) -> None:
        steps = inputs["steps"]
        for step in range(1, steps + 1):
            await asyncio.sleep(inputs["step_s"])
            self._stop_here()
            await self._send_state(item, node_id, step, steps, "running")
            if inputs["preview"]:
                await self._send_preview(item)
            await self._send(item, "progress", node=node_id, value=step, max=steps)

    async def _send_state(
        self, item: Item, node_id: str, value: int, most: int, state: str
    ) -> None:
        done = list(item.graph)[: list(item.graph).index(node_id)]
        nodes = {each: {"value": 1, "max": 1, "state": "finished"} for each in done}
        nodes[node_id] = {"value": value, "max": most, "state": state}
        await self._send(item, "progress_state", nodes=nodes)

    def _stop_here(self) -> None:
        if self._interrupt:
            raise _Interrupted

    def _drawn(self, graph: Graph, inputs: Mapping[str, Any]) -> list[bytes]:
        """Return the files of the pictures that reach an output node."""
        source = inputs["images"][0]
        while "image" in graph[source]["inputs"] and graph[source]["class_type"] != "LoadImage":
            source = graph[source]["inputs"]["image"][0]
        return self._pictures(graph[source])

    def _save(self, graph: Graph, inputs: Mapping[str, Any]) -> list[dict[str, str]]:
        prefix = Path(inputs["filename_prefix"])
        folder = self._base_dir / "output" / prefix.parent
        saved = []
        for index, png in enumerate(self._drawn(graph, inputs), 1):
            name = f"{prefix.name}_{index:05}_.png"
            write(folder / name, png)
            saved.append({"filename": name, "subfolder": str(prefix.parent), "type": "output"})
        return saved

    def _pictures(self, node: Mapping[str, Any]) -> list[bytes]:
        inputs = node["inputs"]
        if node["class_type"] == "LoadImage":
            return [(self._base_dir / "input" / inputs["image"]).read_bytes()]
        picture = encoded("PNG", inputs["width"], inputs["height"], inputs["color"])
        return [picture] * inputs["batch_size"]

    async def _send(self, item: Item, kind: str, **data: Any) -> None:
        self.sent.append(kind)
        if kind == self.script.drop_sockets_at:
            self._drop_sockets()
        event = {"type": kind, "data": {"prompt_id": item.prompt_id, **data}}
        if self.script.noise:
            await self._deliver(item.client_id, "not json")
            await self._deliver(
                item.client_id, json.dumps({"type": "progress", "data": event["data"]})
            )
            await self._deliver(item.client_id, json.dumps({"type": "unheard_of", "data": [1]}))
            await self._deliver(item.client_id, b"\x00")
        await self._deliver(item.client_id, json.dumps(event))

    async def _send_preview(self, item: Item) -> None:
        jpeg = encoded("JPEG", 8, 8)
        if self.script.plain_previews:
            await self._deliver(item.client_id, struct.pack(">II", 1, 1) + jpeg)
            return
        head = json.dumps({"prompt_id": item.prompt_id, "image_type": "image/jpeg"}).encode()
        await self._deliver(item.client_id, struct.pack(">II", 4, len(head)) + head + jpeg)


def _hand_over(inputs: Mapping[str, Any], files: list[bytes]) -> dict[str, Any]:
    """Do the work of the node in comfy_pool/nodes."""
    if len(files) != 1:
        raise _NodeFailed("ValueError", f"expected one image, got {len(files)}")
    image = Image.open(io.BytesIO(files[0])).convert("RGB")
    write(Path(os.environ[PIXELS_VARIABLE]) / inputs["name"], image.tobytes())
    return {"name": inputs["name"], "width": image.width, "height": image.height, "channels": 3}


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def encoded(kind: str, width: int, height: int, color: int = 0) -> bytes:
    buffer = io.BytesIO()
    rgb = (color >> 16 & 255, color >> 8 & 255, color & 255)
    Image.new("RGB", (width, height), rgb).save(buffer, kind)
    return buffer.getvalue()
