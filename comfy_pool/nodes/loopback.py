"""Refuse what a foreign page sends to a ComfyUI that listens on loopback.

ComfyUI compares Host and Origin with each other. They match for a page whose own host name has
been made to lead to 127.0.0.1 (DNS rebinding), and a page without an origin sends `Origin: null`,
which ComfyUI does not compare. Here each must name this machine's loopback and the server's port.
"""

from collections.abc import Awaitable, Callable

from aiohttp import web

VARIABLE = "COMFY_RESTORE_LOOPBACK_ONLY"  # set by whoever starts an engine for itself alone

_NAMES = ("127.0.0.1", "localhost", "[::1]")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def refuse_foreign_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.transport is None:  # the client has gone
        raise web.HTTPForbidden
    port = request.transport.get_extra_info("sockname")[1]
    hosts = {f"{name}:{port}" for name in _NAMES}
    origins = {f"http://{host}" for host in hosts}
    named = [host.lower() for host in request.headers.getall("Host", [])]
    if len(named) != 1 or not hosts.issuperset(named):
        raise web.HTTPForbidden(text="this server is for its own machine: wrong Host")
    if not origins.issuperset(request.headers.getall("Origin", [])):
        raise web.HTTPForbidden(text="this server is for its own machine: wrong Origin")
    return await handler(request)


def guard_prompt_server() -> None:
    """Put the check in front of all that this ComfyUI serves; it must not serve yet."""
    from server import PromptServer  # ComfyUI's own

    PromptServer.instance.app.middlewares.insert(0, refuse_foreign_pages)
