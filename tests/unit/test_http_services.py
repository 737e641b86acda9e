"""Opening and closing the services below the HTTP layer."""

from __future__ import annotations

import threading

import pytest

from restoration.errors import InvalidSettings
from serve_app.app import build_asgi_app
from serve_app.services import open_services
from tests.fakes.site import API, open_site, settings_for_tests


async def test_services_open_without_connecting() -> None:
    """A replica starts and names failed dependencies while they are still starting."""
    services = open_services(settings_for_tests(s3_endpoint_url="http://127.0.0.1:9"))
    assert {workflow.name for workflow in services.catalog} >= {"restore", "enlarge"}
    await services.aclose()


def test_a_service_that_nobody_could_log_in_to_does_not_start() -> None:
    """Without an issuer nothing is opened, and the error names the settings to set."""
    with pytest.raises(InvalidSettings, match="LOCAL_ISSUER_URL"):
        open_services(settings_for_tests(local_issuer_url=None))


async def test_the_server_closes_what_the_app_stands_on() -> None:
    """The end of the server's lifespan closes the services, and nothing earlier does."""
    closed: list[str] = []
    async with open_site() as site:
        site.services.resources.callback(closed.append, "stores")
        app = build_asgi_app(site.services)
        async with app.router.lifespan_context(app):
            assert closed == []
    assert closed == ["stores"]


async def test_no_read_waits_for_a_thread() -> None:
    """The routes' dependencies are coroutines: FastAPI runs any others in one of forty threads."""
    async with open_site() as site, site.client() as client:
        before = set(threading.enumerate())
        for path in (API, "/api/v1/workflows", "/api/v1/usage?since=2026-01-01T00:00:00Z"):
            assert (await client.get(path)).status_code == 200
        assert set(threading.enumerate()) <= before
