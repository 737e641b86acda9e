"""Threads for Postgres and S3 are shared fairly beside a greedy owner."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from sqlalchemy import Connection, text

from persistence.objects.s3 import S3BlobStore
from persistence.postgres.database import Database
from tests.support.greedy import DEADLINE_S, FEW, Gate, in_the_name_of, overtaken


@pytest.mark.parametrize("threads", [1, 2, 8])
async def test_a_database_call_does_not_wait_for_all_of_a_greedy_owner(
    database_url: str, threads: int
) -> None:
    database, gate = Database(database_url, pool_size=threads), Gate()

    def hold(connection: Connection) -> None:
        connection.execute(text("SELECT 1"))
        gate.pass_through()

    def ask(connection: Connection) -> None:
        connection.execute(text("SELECT 1"))

    waited_for = await overtaken(gate, lambda: database.run(hold), lambda: database.run(ask))
    await database.aclose()
    assert waited_for <= FEW


@contextmanager
def bucket_behind(gate: Gate) -> Iterator[str]:
    """Run a server that stores nothing, and answers for the greedy owner's keys through the
    gate."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if "greedy" in self.path:
                gate.pass_through()
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            serving.join()


@pytest.mark.parametrize("threads", [1, 2, 8])
async def test_an_s3_call_does_not_wait_for_all_of_a_greedy_owner(threads: int) -> None:
    gate = Gate()
    with bucket_behind(gate) as url:
        store = S3BlobStore(
            "photos", endpoint_url=url, access_key="key", secret_key="secret", concurrency=threads
        )
        waited_for = await overtaken(
            gate,
            lambda: store.put("greedy.png", b"photo", "image/png"),
            lambda: store.put("modest.png", b"photo", "image/png"),
        )
        await store.aclose()
    assert waited_for <= FEW


async def test_a_call_whose_request_has_gone_keeps_its_place_until_it_ends(
    database_url: str,
) -> None:
    """Otherwise an owner could occupy all threads by breaking requests off."""
    database, gate = Database(database_url, pool_size=2), Gate()

    def hold() -> asyncio.Task[object]:
        return in_the_name_of("greedy", database.run(lambda _: gate.pass_through()))

    gone = hold()
    await gate.until(lambda: gate.waiting == 1)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    again = hold()
    async with asyncio.timeout(DEADLINE_S):
        await in_the_name_of("modest", database.run(lambda connection: connection.closed))
    assert gate.waiting == 1
    gate.open()
    await again
    await database.aclose()
