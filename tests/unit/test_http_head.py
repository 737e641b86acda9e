"""HEAD wherever GET is: its status and its headers, without its body."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import httpx
import pytest
from starlette.routing import BaseRoute, Route

from serve_app.app import build_asgi_app
from serve_app.auth.scopes import USER_SCOPES, Scope
from tests.fakes.site import API, Site
from tests.fakes.stores import MemoryStatusBoard

UNKNOWN = "11111111-1111-1111-1111-111111111111"
# differs in each answer
CHANGING = {"x-request-id", "date", "location"}


async def paths(site: Site) -> dict[str, list[str]]:
    """Return each path of the application with its methods, filled in with existing ids."""
    job_id = await site.submit()
    await site.succeed(await site.start(job_id))
    async with site.client() as client:
        batch = await client.post(
            "/api/v1/batches", files={"image": ("a.png", b"no picture", "image/png")}
        )
    values = {
        "job_id": str(job_id),
        "batch_id": batch.json()["id"],
        "name": "restore",
        "worker": "worker-1",
    }
    app = build_asgi_app(site.services)
    found: dict[str, list[str]] = {}
    for route in routes_of(app.routes):
        found.setdefault(route.path.format(**values), []).extend(route.methods or ())
    return found


def routes_of(routes: Iterable[BaseRoute]) -> Iterator[Route]:
    """Return all routes, including those of included routers, which FastAPI keeps apart."""
    for route in routes:
        if isinstance(route, Route):
            yield route
        else:
            yield from routes_of(route.original_router.routes)  # type: ignore[attr-defined]


def same(headers: httpx.Headers) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in CHANGING}


@pytest.mark.parametrize("query", ["", "?download=1", "?since=2026-01-01T00:00:00Z"])
async def test_every_path_that_has_get_has_head(site: Site, query: str) -> None:
    readable = [path for path, methods in (await paths(site)).items() if "GET" in methods]
    assert len(readable) > 10
    async with site.client(scopes=[*USER_SCOPES, Scope.ADMIN]) as client:
        for path in readable:
            head = await client.head(path + query)
            got = await client.get(path + query)
            assert head.status_code == got.status_code, path
            assert same(head.headers) == same(got.headers), path
            assert head.content == b"", path
            assert got.content or got.status_code == 307, path


async def test_a_path_without_get_has_no_head(site: Site) -> None:
    others = [path for path, methods in (await paths(site)).items() if "GET" not in methods]
    assert others
    async with site.client(scopes=[*USER_SCOPES, Scope.ADMIN]) as client:
        for path in others:
            answer = await client.head(path)
            assert (answer.status_code, answer.content) == (405, b""), path
            assert answer.headers["allow"] == "POST"


async def test_where_get_is_allowed_head_is_named_as_well(site: Site) -> None:
    async with site.client() as client:
        answer = await client.put(f"{API}/{UNKNOWN}")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"


async def test_a_head_of_an_event_stream_follows_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[object] = []
    monkeypatch.setattr(MemoryStatusBoard, "follow", lambda *call: followed.append(call))
    job_id = await site.submit()
    async with site.client() as client:
        answer = await client.head(f"{API}/{job_id}/events")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert followed == []


@pytest.mark.parametrize(("token", "status"), [(False, 401), (True, 404)])
async def test_a_refusal_has_no_body_either(site: Site, *, token: bool, status: int) -> None:
    async with site.client("ann" if token else None) as client:
        answer = await client.head(f"{API}/{UNKNOWN}")
    assert (answer.status_code, answer.content) == (status, b"")
    assert int(answer.headers["content-length"]) > 0
