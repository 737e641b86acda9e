"""Run the services that ours is compared with, each in processes of its own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

READY_S = 120.0


@contextmanager
def running(command: Sequence[str | Path], environ: Mapping[str, str]) -> Iterator[None]:
    """Run the command until the end of the block; its output is dropped."""
    with subprocess.Popen(
        command, env={**os.environ, **environ}, stdout=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.terminate()


def wait_until_ready(url: str) -> None:
    """Return when `url` answers with a success. Raises httpx.HTTPError after READY_S."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            httpx.get(url, trust_env=False).raise_for_status()
        except httpx.HTTPError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return
