"""HTTP to where a stranger asks for, and to no address that was not looked at first.

A name is resolved once for a request, every address it has is shown to the rules, and the
connection is made to one of these very addresses: what the name resolves to afterwards changes
nothing. The Host header, the name in the TLS handshake and the certificate stay the name's.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence

import httpx

from restoration.errors import InvalidWebhook
from restoration.webhooks.urls import Target, WebhookRules, check_url

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

# A name with a dead address among its own gets a second chance, and no more.
MAX_ADDRESSES = 2


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of `host`, in the order in which to try them. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class PinnedTransport(httpx.AsyncBaseTransport):
    """Refuses, by httpx.ConnectError, what `rules` do not permit; see the module."""

    def __init__(
        self,
        rules: WebhookRules,
        limits: httpx.Limits,
        resolve: Resolve = resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`limits` should keep no connection: it would serve every name that has its address."""
        self._rules = rules
        self._resolve = resolve
        self._wire = httpx.AsyncHTTPTransport(verify=tls or True, limits=limits)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            target = check_url(str(request.url), self._rules)  # they may be stricter by now
        except InvalidWebhook as error:
            raise httpx.ConnectError(error.message) from error
        first, *others = await self._addresses(target)
        try:
            return await self._wire.handle_async_request(_pinned(request, target, first))
        except (httpx.ConnectError, httpx.ConnectTimeout):
            if not others:
                raise
        return await self._wire.handle_async_request(_pinned(request, target, others[0]))

    async def _addresses(self, target: Target) -> Sequence[str]:
        try:
            addresses = list(dict.fromkeys(await self._resolve(target.host, target.port)))
        except (OSError, UnicodeError):
            addresses = []
        if not addresses or not all(self._rules.permits(each, target.port) for each in addresses):
            # The same for both, or it would tell which names the inside has.
            raise httpx.ConnectError("the host does not resolve to public addresses alone")
        return addresses[:MAX_ADDRESSES]

    async def aclose(self) -> None:
        await self._wire.aclose()


def _pinned(request: httpx.Request, target: Target, address: str) -> httpx.Request:
    """The same request to `address`; its Host header names the host already."""
    return httpx.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": target.host},
    )
