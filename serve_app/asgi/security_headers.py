"""Security headers for every response. Pure ASGI.

A header that a route sets itself is kept. HSTS is left to the load balancer, which terminates TLS:
this server's own port has no certificate.
"""

from __future__ import annotations

from types import MappingProxyType

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NO_CONTENT_POLICY = "default-src 'none'; frame-ancestors 'none'"
SECURITY_HEADERS = MappingProxyType(
    {
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": NO_CONTENT_POLICY,
        "X-Frame-Options": "DENY",  # the same as frame-ancestors, for older browsers
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        # Nearly all responses are private to an owner, and none is requested twice.
        "Cache-Control": "no-store",
    }
)
# The first message of a response, and that of a refused websocket handshake.
RESPONSE_STARTS = frozenset({"http.response.start", "websocket.http.response.start"})


class SecurityHeaders:
    """Adds SECURITY_HEADERS, except those that the response already has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] in RESPONSE_STARTS:
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)
