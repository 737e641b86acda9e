"""The ASGI application: routes, error handlers and middleware around a set of services.

It runs under plain uvicorn as well as under Serve. It owns the services, and closes them when the
server ends its lifespan. It keeps no state of jobs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from operator import attrgetter

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from restoration.errors import BatchTooLarge, ImageTooLarge
from restoration.limits.fair_places import FairPlaces, as_many_as_are_free
from restoration.observability.metrics import SSE_CLIENTS
from serve_app.asgi.errors import install_error_handlers
from serve_app.asgi.flow_control import FlowControlledApp
from serve_app.asgi.head_requests import HeadRequests
from serve_app.asgi.middleware import (
    QUIET_PATHS,
    REQUEST_ID,
    BodyLimit,
    BodyPace,
    Limit,
    RequestContext,
)
from serve_app.asgi.openapi import install_openapi
from serve_app.asgi.security_headers import SecurityHeaders
from serve_app.forms.batch_form import BATCH_OVERHEAD_BYTES
from serve_app.forms.form import FORM_OVERHEAD_BYTES
from serve_app.forms.upload_bytes import UploadBytes
from serve_app.forms.upload_slots import upload_slots
from serve_app.readiness import ReadinessProbe
from serve_app.routes import (
    admin,
    batches,
    events,
    health,
    reference,
    restorations,
    runs,
    uploads,
    usage,
    workflows,
)
from serve_app.services import Services

_VERSION = version("comfy-restore")  # reads a file, and apps are built on an event loop
_SENT_HEADERS = [
    "Authorization",
    "Idempotency-Key",
    "Last-Event-ID",
    "Prefer",
    REQUEST_ID,
    "Range",
    "If-Range",
]
_READABLE_HEADERS = [
    "Location",
    REQUEST_ID,
    "Idempotent-Replayed",
    "Preference-Applied",
    "Retry-After",
    "RateLimit",
    "RateLimit-Policy",
    "Accept-Ranges",
    "Content-Range",
    "Content-Disposition",
    "ETag",
    "Repr-Digest",
]


def build_asgi_app(services: Services) -> FastAPI:
    """Return the application for these services, which it closes at the end of its lifespan."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await readiness.aclose()
            await services.aclose()

    readiness = ReadinessProbe(
        {
            "postgres": services.jobs.ping,
            "s3": services.blobs.ping,
            "redis": services.status.ping,
            "issuer": services.authenticator.ping,
        }
    )
    app = FastAPI(
        title="comfy-restore",
        version=_VERSION,
        summary="Restore damaged photos with ComfyUI.",
        description="Every error is a problem document (RFC 9457) with a stable `code` and the id "
        "of the request.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from other hosts; ours has no scripts
        redoc_url=None,
        redirect_slashes=False,  # the redirect's address would come from the client's Host header
        generate_unique_id_function=attrgetter("name"),
        telemetry={
            "exclude": lambda scope: scope["path"] in QUIET_PATHS,
            "operation_spans": False,  # the submission's own steps are more telling
            "metrics": False,
            "logs": False,
        },
    )
    app.state.services = services
    app.state.readiness = readiness
    app.state.upload_bytes = UploadBytes(services.settings.upload_bytes_in_flight)
    app.state.uploads = upload_slots(services.settings.max_uploads_in_flight)
    app.state.streams = FairPlaces(
        services.settings.max_event_streams, "event streams", as_many_as_are_free
    )
    services.meter.gauge(SSE_CLIENTS, 0)
    app.state.waits = FairPlaces(services.settings.max_waits, "waits", as_many_as_are_free)
    app.state.downloads = FairPlaces(
        services.settings.max_downloads, "downloads", as_many_as_are_free
    )
    modules = (
        restorations,
        runs,
        events,
        batches,
        uploads,
        workflows,
        usage,
        admin,
        health,
        reference,
    )
    for module in modules:
        app.include_router(module.router)
    install_error_handlers(app)
    install_openapi(app)
    _install_middleware(app, services)
    return app


def _install_middleware(app: FastAPI, services: Services) -> None:
    """Add the middleware, the innermost first."""
    settings = services.settings
    app.add_middleware(HeadRequests)
    app.add_middleware(BodyPace)
    app.add_middleware(
        BodyLimit,
        limit=Limit(settings.upload_max_bytes + FORM_OVERHEAD_BYTES, ImageTooLarge),
        paths={
            batches.PATH: Limit(settings.batch_max_bytes + BATCH_OVERHEAD_BYTES, BatchTooLarge),
            uploads.PATH: uploads.BODY_LIMIT,
        },
    )
    app.add_middleware(RequestContext)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=_SENT_HEADERS,
            expose_headers=_READABLE_HEADERS,
        )
    app.add_middleware(SecurityHeaders)
    app.add_middleware(FlowControlledApp)
