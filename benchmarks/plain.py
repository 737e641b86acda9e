"""The same application under plain uvicorn: the cost of the routes without Ray Serve."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fastapi import FastAPI

from benchmarks.processes import running, wait_until_ready
from restoration.settings import load_settings
from serve_app.app import build_asgi_app
from serve_app.local.temporary import free_port
from serve_app.services import open_services


def build() -> FastAPI:
    return build_asgi_app(open_services(load_settings(os.environ)))


@contextmanager
def plain_service(environ: Mapping[str, str], processes: int = 1) -> Iterator[str]:
    """Run the service, and yield its URL."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "uvicorn", "--factory", "benchmarks.plain:build"),
        *("--port", str(port), "--workers", str(processes)),
        *("--no-access-log", "--log-level", "warning"),
    ]
    url = f"http://127.0.0.1:{port}"
    with running(command, environ):
        wait_until_ready(f"{url}/healthz")
        yield url
