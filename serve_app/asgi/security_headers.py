"""The headers with which every answer tells a browser to do nothing clever with it. Pure ASGI.

What a route says itself about one of them stands. HSTS is for the load balancer, which has the
certificate: a promise about TLS is not for a port without it to make.
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
        # Nearly all of it is somebody's own, and none of it is asked for twice.
        "Cache-Control": "no-store",
    }
)
# An answer's first message; the second is that to a websocket's request that is refused.
RESPONSE_STARTS = frozenset({"http.response.start", "websocket.http.response.start"})


class SecurityHeaders:
    """Adds what an answer does not say by itself."""

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
