"""Point 7: the meter's figures, apart from attempts and the census."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from uuid import uuid4

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from actors.execution.engine_metrics import EngineMetrics
from comfy_pool.protocol.responses import parse_system_stats
from restoration.engine_port import Vram
from restoration.errors import EngineUnavailable
from restoration.observability.metrics import (
    ENGINE_STARTS,
    ENGINE_UP,
    REFUSED,
    SSE_CLIENTS,
    VRAM_FREE,
    VRAM_TOTAL,
)
from serve_app.app import build_asgi_app
from serve_app.routes.events import EventStream
from tests.fakes.meter import MemoryMeter
from tests.fakes.site import API, open_site, submission

GPU = {"name": "cuda:0", "type": "cuda", "index": 0, "vram_total": 24, "vram_free": 20}
CPU = {"name": "cpu", "type": "cpu", "index": None, "vram_total": 64, "vram_free": 32}


@dataclass
class Engine:
    starts: int = 1
    gpu: Vram | None = None
    down: bool = False

    async def vram(self) -> Vram | None:
        if self.down:
            raise EngineUnavailable("no answer")
        return self.gpu


@pytest.mark.metrics
async def test_an_engine_is_up_down_and_started_anew() -> None:
    """Each start counts once, however often the meter reads it."""
    meter, engine = MemoryMeter(), Engine()
    metrics = EngineMetrics(engine, meter)
    await metrics.update()
    assert (meter.gauged(ENGINE_UP), meter.counted(ENGINE_STARTS)) == (1, 1)
    engine.down = True
    await metrics.update()
    assert (meter.gauged(ENGINE_UP), meter.counted(ENGINE_STARTS)) == (0, 1)
    engine.down, engine.starts = False, 3
    await metrics.update()
    await metrics.update()
    assert (meter.gauged(ENGINE_UP), meter.counted(ENGINE_STARTS)) == (1, 3)


@pytest.mark.metrics
async def test_memory_is_told_where_there_is_a_gpu() -> None:
    """For an engine on the CPU no memory is reported."""
    meter, engine = MemoryMeter(), Engine()
    metrics = EngineMetrics(engine, meter)
    await metrics.update()
    assert not {VRAM_TOTAL.name, VRAM_FREE.name} & {name for name, _ in meter.gauges}
    engine.gpu = Vram(24, 20)
    await metrics.update()
    assert (meter.gauged(VRAM_TOTAL), meter.gauged(VRAM_FREE)) == (24, 20)


@pytest.mark.metrics
@pytest.mark.parametrize(
    ("devices", "expected"), [([GPU], Vram(24, 20)), ([CPU], None), ([], None)]
)
def test_vram_as_comfyui_tells_it(devices: list[object], expected: Vram | None) -> None:
    """The machine's memory, which ComfyUI reports for a CPU, is not a GPU's."""
    body = json.dumps({"system": {}, "devices": devices}).encode()
    assert parse_system_stats(body).vram == expected


@pytest.mark.metrics
async def test_open_streams_are_counted_until_they_are_closed() -> None:
    """They count down however they end."""
    meter, counts = MemoryMeter(), list[float]()
    async with open_site() as site:
        app = build_asgi_app(replace(site.services, meter=meter))
    assert meter.gauged(SSE_CLIENTS) == 0
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "app": app}

    async def one_event() -> AsyncGenerator[bytes, None]:
        yield b"event"

    async def receive() -> Message:
        raise AssertionError

    async def break_off(_: Message) -> None:
        counts.append(meter.gauged(SSE_CLIENTS))
        raise OSError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            with pytest.raises(ClientDisconnect):
                await EventStream(one_event(), bytes, "bob")(scope, receive, break_off)
        counts.append(meter.gauged(SSE_CLIENTS))

    await EventStream(one_event(), bytes, "ann")(scope, receive, send)
    assert counts == [2, 1, 1, 1]
    assert meter.gauged(SSE_CLIENTS) == 0


@pytest.mark.metrics
async def test_refusals_count_by_code_and_only_of_what_would_change_something() -> None:
    """A refused submission counts; a poll for an absent job does not."""
    meter = MemoryMeter()
    async with open_site() as site:
        site = replace(site, services=replace(site.services, meter=meter))
        async with site.client() as client:
            await client.post(API, **submission(workflow="no-such"))
            await client.get(f"{API}/{uuid4()}")
            await client.post(f"{API}/{uuid4()}/cancel")
    assert meter.counted(REFUSED, code="unknown_workflow") == 1
    assert meter.counted(REFUSED, code="job_not_found") == 1
    assert meter.counted(REFUSED) == 2
