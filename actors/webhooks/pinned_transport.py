"""An HTTP transport for untrusted URLs that connects only to addresses it has checked.

It resolves the host once for each request, checks every address against the rules, and connects to
one of those addresses, so that a later change of DNS (rebinding) has no effect. The Host header,
the server name of the TLS handshake and the verified certificate remain those of the host.
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

# A second address is tried if the first is unreachable, and no more.
MAX_ADDRESSES = 2


async def resolve(host: str, port: int) -> Sequence[str]:
    """Return the IP addresses of `host`, in the order to try them. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class PinnedTransport(httpx.AsyncBaseTransport):
    """Sends requests that `rules` permit; raises httpx.ConnectError for all others."""

    def __init__(
        self,
        rules: WebhookRules,
        limits: httpx.Limits,
        resolve: Resolve = resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`limits` must not allow keep-alive, because connections are pooled by address, not host.

        A kept connection would serve other hosts that have the same address.
        """
        self._rules = rules
        self._resolve = resolve
        self._wire = httpx.AsyncHTTPTransport(verify=tls or True, limits=limits)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            # Checked again: the rules may have become stricter since the submission.
            target = check_url(str(request.url), self._rules)
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
            # One message for both cases: it must not reveal which internal names exist.
            raise httpx.ConnectError("the host does not resolve to public addresses only")
        return addresses[:MAX_ADDRESSES]

    async def aclose(self) -> None:
        await self._wire.aclose()


def _pinned(request: httpx.Request, target: Target, address: str) -> httpx.Request:
    """Return the same request to `address`. Its Host header names the host already."""
    return httpx.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": target.host},
    )
