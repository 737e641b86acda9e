"""Browser security of all answers: headers, the only page, and CORS."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest

from restoration.errors import InvalidSettings
from restoration.settings import load_settings
from serve_app.asgi.security_headers import SECURITY_HEADERS
from serve_app.web.reference import render
from tests.fakes.site import API, open_site
from tests.support.stack import Stack

LISTED = "https://app.example.com"
HTML = "text/html; charset=utf-8"
MINIMAL = {"DATABASE_URL": "postgresql://d", "REDIS_URL": "redis://r", "S3_BUCKET": "b"}


class _Page(HTMLParser):
    """Collects the tags of a page and all of their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs


def _demand_harmless(html: str) -> None:
    page = _Page(html)
    assert not page.tags & {"script", "style", "iframe", "object", "embed", "form", "base", "img"}
    for name, value in page.attributes:
        assert name in {"lang", "charset", "name", "content", "rel", "href", "id"}, name
        assert name != "href" or re.fullmatch(r"[a-z./]+", value or ""), value


@pytest.mark.exposure
@pytest.mark.parametrize("path", ["/docs", "/docs/reference.css", "/openapi.json", "/healthz", API])
def test_the_stacks_answers_are_shut(stack: Stack, path: str) -> None:
    """Every answer has each header once; they forbid sniffing, framing, referrers and other
    hosts."""
    answer = httpx.get(stack.record.url + path, trust_env=False)
    for name, value in SECURITY_HEADERS.items():
        found = answer.headers.get_list(name)
        assert len(found) == 1, name
        if name != "Content-Security-Policy" or path != "/docs":
            assert found == [value]
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.exposure
def test_the_stacks_one_page_has_no_script(stack: Stack) -> None:
    """The reference page loads one style sheet from its own origin, and nothing else."""
    with stack.http() as http:
        page, style = http.get("/docs"), http.get("/docs/reference.css")
    assert (page.headers["content-type"], style.headers["content-type"]) == (
        HTML,
        "text/css; charset=utf-8",
    )
    _demand_harmless(page.text)
    directives = dict(
        each.strip().split(" ", 1) for each in page.headers["content-security-policy"].split(";")
    )
    assert directives == {
        "default-src": "'none'",
        "style-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert "url(" not in style.text
    assert "@import" not in style.text


@pytest.mark.exposure
async def test_there_is_no_other_page() -> None:
    """No answer but the reference page is HTML, for any request."""
    async with open_site() as site, site.client(None) as client:
        document = (await client.get("/openapi.json")).json()
        paths = ["/", "/docs", "/redoc", "/docs/oauth2-redirect", "/<script>", *document["paths"]]
        kinds = {
            path: (await client.get(path, headers={"Accept": "text/html"})).headers["content-type"]
            for path in paths
        }
    assert [path for path, kind in kinds.items() if "html" in kind] == ["/docs"]


@pytest.mark.exposure
async def test_every_operation_is_in_the_reference() -> None:
    """The reference page has a section for each operation in the document."""
    async with open_site() as site, site.client(None) as client:
        document = (await client.get("/openapi.json")).json()
        page = (await client.get("/docs")).text
    for path, item in document["paths"].items():
        assert f"<code>{path}</code>" in page
        for operation in item.values():
            assert f'<section id="{operation["operationId"]}">' in page


@pytest.mark.exposure
def test_what_the_document_says_stays_text() -> None:
    """Markup anywhere in the document is shown as text."""
    evil = '"><script src=//evil>`</code><img onerror=x>`'
    operation: dict[str, Any] = {
        "operationId": evil,
        "description": evil,
        "parameters": [{"name": evil, "in": evil, "description": evil}],
        "requestBody": {
            "content": {evil: {"schema": {"properties": {evil: {"description": evil}}}}}
        },
        "responses": {evil: {"description": evil, "content": {evil: {}}}},
    }
    info = {"title": evil, "version": evil, "summary": evil, "description": evil}
    _demand_harmless(render({"info": info, "paths": {evil: {"get": operation}}}))


def _preflight(origin: str) -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }


@pytest.mark.exposure
@pytest.mark.parametrize("origin", [LISTED, "null", "https://evil.example"])
def test_the_stack_shares_with_no_origin(stack: Stack, origin: str) -> None:
    """Without CORS_ORIGINS a preflight is a method that is not allowed."""
    asked = httpx.options(stack.record.url + API, headers=_preflight(origin), trust_env=False)
    got = httpx.get(stack.record.url + "/healthz", headers={"Origin": origin}, trust_env=False)
    assert (asked.status_code, got.status_code) == (405, 200)
    for answer in (asked, got):
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.exposure
@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (LISTED, True),
        ("null", False),
        ("https://evil.example", False),
        (f"{LISTED}.evil.example", False),
        ("https://sub.app.example.com", False),
        ("http://app.example.com", False),
        (f"{LISTED}:8443", False),
        ("HTTPS://APP.EXAMPLE.COM", False),
    ],
)
async def test_only_listed_origins_are_answered(origin: str, allowed: bool) -> None:
    """Origins must match exactly; answers never allow credentials or `*`."""
    async with open_site(cors_origins=(LISTED,)) as site, site.client() as client:
        asked = await client.options(API, headers=_preflight(origin))
        got = await client.get(API, headers={"Origin": origin})
    assert (asked.status_code == 200) is allowed
    for answer in (asked, got):
        assert answer.headers.get("access-control-allow-origin") == (LISTED if allowed else None)
        assert "access-control-allow-credentials" not in answer.headers
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.exposure
@pytest.mark.parametrize(
    "origin", ["*", "null", "https://app.example.com/", "app.example.com", "https://*.example.com"]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    """A value that would allow everyone, or by mistake no one, stops the service at its start."""
    with pytest.raises(InvalidSettings, match=r"CORS_ORIGINS.*not an origin"):
        load_settings({**MINIMAL, "CORS_ORIGINS": f"{LISTED},{origin}"})


@pytest.mark.exposure
async def test_problems_are_no_pages() -> None:
    """Markup in a request can only come back inside JSON."""
    async with open_site() as site, site.client() as client:
        answer = await client.get(f"{API}/<script>alert(1)</script>")
    assert answer.headers["content-type"] == "application/problem+json"
    assert json.loads(answer.text)["code"]
