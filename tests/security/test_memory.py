"""The memory of the running service stays bounded for any input and reading speed."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import numpy
import pytest
from PIL import Image

from restoration.images import MEBIBYTE
from serve_app.auth.scopes import USER_SCOPES, Scope
from tests.fakes.site import API
from tests.support.polling import wait_until
from tests.support.stack import Stack
from tests.support.stack_processes import of_stack

pytestmark = pytest.mark.real_engine
BATCHES = "/api/v1/batches"
OWNER = "greedy"
BOUND = 300 * MEBIBYTE  # above the memory held before
KEPT = 100 * MEBIBYTE  # may be left of it a minute later
GIVEN_BACK_S = 60
STALLED_S = 5  # A connection that accepts no data for this long is stalled.
PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
INVERT = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "image"}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
}


def noise(side: int) -> bytes:
    """Return a PNG with 3 bytes per pixel that cannot be compressed."""
    pixels = numpy.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=numpy.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


@dataclass
class Memory:
    """Private memory in bytes of the ingress and of the proxy in front of it."""

    pids: dict[str, int]
    before: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)

    def now(self) -> dict[str, int]:
        return {name: self._private_bytes(pid) for name, pid in self.pids.items()}

    @staticmethod
    def _private_bytes(pid: int) -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert found, "the process has ended"
        return int(found[1]) * 1024

    def above(self, held: dict[str, int]) -> dict[str, int]:
        return {name: held[name] - self.before[name] for name in held}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record the peak of each process during the block."""
        self.before = self.peak = self.now()
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.05):
                self.peak = {name: max(self.peak[name], now) for name, now in self.now().items()}

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            yield
        finally:
            ended.set()
            watching.join()

    def assert_given_back(self) -> None:
        wait_until(lambda: max(self.above(self.now()).values()) < KEPT, GIVEN_BACK_S)


@pytest.fixture
def memory(stack: Stack) -> Memory:
    pids = {}
    for process in of_stack(stack.state_dir, stack.record.pid):
        for name, title in (("ingress", "ServeReplica:comfy-restore:Ingress"), ("proxy", "Proxy")):
            if process.command.startswith("ray::") and title in process.command:
                pids[name] = process.pid
    assert pids.keys() == {"ingress", "proxy"}
    return Memory(pids)


def connect(stack: Stack) -> socket.socket:
    """Open a connection that gives up when the service neither accepts nor sends data."""
    parts = urlsplit(stack.record.url)
    assert parts.hostname is not None
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((parts.hostname, parts.port))
    connection.settimeout(STALLED_S)
    return connection


def head(stack: Stack, method: str, target: str, *headers: str) -> bytes:
    lines = [
        f"{method} {target} HTTP/1.1",
        "Host: test",
        f"Authorization: Bearer {stack.token(OWNER)}",
    ]
    return "\r\n".join([*lines, *headers, "", ""]).encode()


def test_a_batch_that_is_sent_faster_than_it_is_read_is_held_up(
    stack: Stack, memory: Memory
) -> None:
    photo = PART + noise(2000) + b"\r\n"
    chunk = b"%x\r\n%b\r\n" % (len(photo), photo)
    multipart = "Content-Type: multipart/form-data; boundary=b"
    with memory.watched(), connect(stack) as connection:
        connection.sendall(head(stack, "POST", BATCHES, multipart, "Transfer-Encoding: chunked"))
        try:
            for _ in range(600 * MEBIBYTE // len(chunk)):
                connection.sendall(chunk)
        except TimeoutError:
            pass  # The service reads no more until it has room.
    assert max(memory.above(memory.peak).values()) < BOUND
    memory.assert_given_back()


def test_results_that_are_not_read_stay_where_they_are(stack: Stack, memory: Memory) -> None:
    with stack.http(OWNER, [*USER_SCOPES, Scope.RUN]) as http:
        sent = http.post(
            "/api/v1/runs",
            files={"image": ("a.png", noise(3200))},
            data={"graph": json.dumps(INVERT), "output_format": "png"},
            headers={"Prefer": "wait=60"},
        )
        job = sent.json()
        while job["status"] not in {"succeeded", "failed"}:
            job = http.get(job["links"]["self"]).json()
            time.sleep(1)
    size_bytes = job["output"]["size_bytes"]
    assert 20 * size_bytes > BOUND + 100 * MEBIBYTE, "too small to show anything"
    download = head(stack, "GET", f"{job['links']['result']}?download=1")
    with memory.watched():
        connections = [connect(stack) for _ in range(20)]
        for connection in connections:
            connection.sendall(download)
        begun = [connection.recv(1) for connection in connections]
        time.sleep(STALLED_S)  # time to buffer data that was not asked for
        for connection in connections:
            connection.close()
    assert set(begun) == {b"H"}
    assert max(memory.above(memory.peak).values()) < BOUND
    memory.assert_given_back()


def test_batches_beyond_what_fits_are_refused(stack: Stack, memory: Memory) -> None:
    photo = PART + noise(3200) + b"\r\n"
    length = 5 * len(photo) + len(b"--b--\r\n")
    multipart = "Content-Type: multipart/form-data; boundary=b"

    def send(_: int) -> int:
        with connect(stack) as connection:
            connection.settimeout(100)
            connection.sendall(head(stack, "POST", BATCHES, multipart, f"Content-Length: {length}"))
            try:
                for _ in range(5):
                    connection.sendall(photo)
                connection.sendall(b"--b--\r\n")
            except OSError:
                pass  # refused and closed, but the answer can still be read
            return int(connection.recv(12).split()[1])

    with memory.watched(), ThreadPoolExecutor(24) as threads:
        statuses = Counter(threads.map(send, range(24)))
    assert statuses.keys() == {202, 429}
    assert max(memory.above(memory.peak).values()) < 2 * BOUND  # 24 of them are 3.7 GB
    memory.assert_given_back()


def test_links_that_are_never_used_come_to_an_end(stack: Stack) -> None:
    claims = {"https://comfy-restore/quotas": {"stored_bytes": 10 * 50 * MEBIBYTE}}
    with stack.http("hoarder") as http:
        http.headers["Authorization"] = f"Bearer {stack.token('hoarder', claims=claims)}"
        upload = {"content_type": "image/png", "size_bytes": 50 * MEBIBYTE}
        answers = [http.post("/api/v1/uploads", json=upload) for _ in range(11)]
        photo = http.post(API, files={"image": ("a.png", noise(64))})
    assert [answer.status_code for answer in answers] == [201] * 10 + [429]
    for refused in (answers[-1], photo):
        assert (refused.status_code, refused.json()["code"]) == (429, "storage_full")
