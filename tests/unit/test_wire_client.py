"""No exception of httpx leaves the client."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from comfy_pool.client import ComfyClient
from restoration.errors import EngineFailed, EngineUnavailable


def _below(kind: type[Exception]) -> Iterator[type[Exception]]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)


def client_that_gets(handler: httpx.MockTransport) -> ComfyClient:
    client = ComfyClient("http://engine")
    client._http = httpx.AsyncClient(base_url="http://engine", transport=handler)
    return client


@pytest.mark.parametrize(
    "kind", [each for each in _below(httpx.RequestError) if each is not httpx.TransportError]
)
async def test_every_transport_error_is_unavailable(kind: type[httpx.RequestError]) -> None:
    """Whatever goes wrong on the way is EngineUnavailable, with its cause chained."""

    def fail(_: httpx.Request) -> httpx.Response:
        raise kind("broken")

    client = client_that_gets(httpx.MockTransport(fail))
    with pytest.raises(EngineUnavailable) as caught:
        await client.history("p")
    assert isinstance(caught.value.__cause__, kind)
    assert not await client.responds(1.0)


@pytest.mark.parametrize(
    ("status", "error"),
    [(500, EngineUnavailable), (503, EngineUnavailable), (404, EngineFailed), (302, EngineFailed)],
)
async def test_every_refusal_is_ours(status: int, error: type[Exception]) -> None:
    """The server's own trouble may pass; a refusal will not."""
    client = client_that_gets(httpx.MockTransport(lambda _: httpx.Response(status)))
    with pytest.raises(error, match=str(status)):
        await client.forget("p")


async def test_an_address_that_is_none() -> None:
    """A setting that is no URL is EngineUnavailable too, when it is used."""
    client = ComfyClient("nonsense")
    with pytest.raises(EngineUnavailable):
        await client.history("p")
    await client.aclose()


async def test_an_answer_is_recent_until_a_call_fails() -> None:
    """What has failed since is no sign that the engine is well, whatever it answered before."""
    broken = False

    def answer(_: httpx.Request) -> httpx.Response:
        if broken:
            raise httpx.ConnectError("gone")
        return httpx.Response(200)

    client = client_that_gets(httpx.MockTransport(answer))
    assert not client.responded_within(60)
    await client.forget("p")
    assert client.responded_within(60)
    broken = True
    with pytest.raises(EngineUnavailable):
        await client.forget("p")
    assert not client.responded_within(60)
