"""Reject requests that foreign web pages send to a ComfyUI on loopback.

ComfyUI only compares Host with Origin. They match when a page's own host name resolves to 127.0.0.1
(DNS rebinding), and `Origin: null` is not compared at all. This middleware requires each header to
name the loopback interface and the server's port.
"""

from collections.abc import Awaitable, Callable

from aiohttp import web

VARIABLE = "COMFY_RESTORE_LOOPBACK_ONLY"  # set for owned engines

_NAMES = ("127.0.0.1", "localhost", "[::1]")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def refuse_foreign_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer 403 unless Host and every Origin name the loopback interface and this port."""
    if request.transport is None:  # the client has gone
        raise web.HTTPForbidden
    port = request.transport.get_extra_info("sockname")[1]
    hosts = {f"{name}:{port}" for name in _NAMES}
    origins = {f"http://{host}" for host in hosts}
    named = [host.lower() for host in request.headers.getall("Host", [])]
    if len(named) != 1 or not hosts.issuperset(named):
        raise web.HTTPForbidden(
            text="Host must be a loopback address: this server accepts local requests only"
        )
    if not origins.issuperset(request.headers.getall("Origin", [])):
        raise web.HTTPForbidden(
            text="Origin must be a loopback address: this server accepts local requests only"
        )
    return await handler(request)


def guard_prompt_server() -> None:
    """Install the middleware in front of ComfyUI's routes. Call it before the server starts."""
    from server import PromptServer  # ComfyUI's own

    PromptServer.instance.app.middlewares.insert(0, refuse_foreign_pages)
