"""The same application under plain uvicorn: the cost of the routes without Ray Serve."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx
from fastapi import FastAPI

from restoration.settings import load_settings
from serve_app.app import build_asgi_app
from serve_app.services import open_services
from tests.support.stack import free_port

START_TIMEOUT_S = 30.0


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
    process = subprocess.Popen(command, env={**os.environ, **environ}, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            httpx.get(f"{url}/healthz", trust_env=False).raise_for_status()
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return
