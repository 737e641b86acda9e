"""The local stack: services, token issuer, Ray and the Serve application, as one process tree.

`restore up` is its root. A service whose address is set in the environment is used, not started.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import httpx

from comfy_pool.install.engine import existing_engine, find_installed, install_engine
from comfy_pool.install.models import install_models
from comfy_pool.install.toolbox import Progress
from persistence.embedded.local import LocalServices, Role, ServiceUrls
from persistence.embedded.service import Service
from persistence.embedded.state import StateDir
from persistence.embedded.supervisor import exit_on_sigterm
from persistence.postgres.migrate import upgrade
from restoration.errors import DependencyUnavailable
from restoration.settings import FILE_SUFFIX, NodeSettings, load_node_settings, load_settings
from serve_app import haproxy
from serve_app.auth.local_issuer import issuer_url
from serve_app.local.processes import mark
from serve_app.local.ray_process import RayLost, RayProcess
from serve_app.local.record import (
    StackOptions,
    StackRecord,
    issuer_folder,
    recording,
    webhook_secret,
)
from workflows.catalog import load_catalog

# Give up if Ray is lost this often in a row, each time within a minute of its start. An overloaded
# machine may need several tries: the raylet gives its agents 15 s to start.
STEADY_S = 60.0
SHORT_LIVES = 5
# a service whose variable is set is not started here
_NAMED_BY: Mapping[Role, str] = {
    "postgres": "DATABASE_URL",
    "redis": "REDIS_URL",
    "s3": "S3_BUCKET",
}
# webhook receivers run on this machine as well
_LOCAL_WEBHOOKS = {"WEBHOOK_ALLOW_HTTP": "true", "WEBHOOK_NETWORKS": "127.0.0.0/8,::1/128"}


def run_stack(
    options: StackOptions, progress: Progress, on_ready: Callable[[StackRecord], None]
) -> None:
    """Start everything, call `on_ready`, serve until SIGINT or SIGTERM, and stop everything.

    A lost Ray is restarted, and `on_ready` is called again. Ends with KeyboardInterrupt or
    SystemExit. Raises SetupError and DependencyUnavailable.
    """
    node = load_node_settings(os.environ)
    os.environ.update(mark(node.state_dir))  # every process started here inherits it
    with exit_on_sigterm(), _services(node, progress) as addresses, _proxy() as proxy:
        os.environ.update(addresses | proxy)  # for Ray and its workers
        settings = load_settings(os.environ)
        upgrade(settings.database_url.get_secret_value())
        provide_engine(node, progress)
        issuer = None if settings.auth0_domain else settings.local_issuer_url
        with recording(node.state_dir) as record:
            _serve(node, options, issuer, progress, on_ready, record)


@contextmanager
def _proxy() -> Iterator[dict[str, str]]:
    """Yield the variables of Serve's HAProxy if it is enabled, otherwise none."""
    if os.environ.get(haproxy.ENABLED) != "1":
        yield {}
        return
    with TemporaryDirectory(prefix="haproxy-") as folder:  # socket paths must be short
        yield haproxy.local_environment(Path(folder))


def _serve(
    node: NodeSettings,
    options: StackOptions,
    issuer: str | None,
    progress: Progress,
    on_ready: Callable[[StackRecord], None],
    record: Callable[[StackRecord], None],
) -> NoReturn:
    """Serve, and restart Ray whenever it is lost; Postgres keeps all jobs.

    Raises DependencyUnavailable if Ray keeps being lost, or the service does not start.
    """
    url = f"http://127.0.0.1:{options.port}"
    stack = StackRecord(os.getpid(), url, issuer=issuer, drain_s=node.drain_s)
    short_lives = 0
    while True:
        progress(f"starting Ray and the service, GPU workers: {options.workers}")
        steady_from = math.inf
        try:
            with RayProcess(node.state_dir, options, node.drain_s) as ray:
                try:
                    report = ray.wait_until_ready(partial(_answers, f"{url}/readyz"))
                    stack = replace(
                        stack, ray_address=report.gcs, metrics=report.metrics, lost=None
                    )
                    record(stack)
                    on_ready(stack)
                    steady_from = time.monotonic() + STEADY_S
                    ray.wait_until_lost()
                except (KeyboardInterrupt, SystemExit):
                    progress("stopping")
                    raise
        except RayLost as lost:
            short_lives = 1 if time.monotonic() > steady_from else short_lives + 1
            if short_lives > SHORT_LIVES:
                raise DependencyUnavailable(
                    f"Ray was lost {short_lives} times in a row, most recently because "
                    f"{lost}; no job is lost, and `restore up` continues with all of them"
                ) from lost
            progress(f"Ray was lost: {lost}")
            if stack.ray_address:  # the stack has served before
                record(replace(stack, lost=str(lost)))


def provide_engine(node: NodeSettings, progress: Progress) -> None:
    """Install the engine and the models if they are missing.

    An engine at COMFYUI_URL needs nothing. For one at COMFYUI_DIR only the models are installed.
    Raises ProvisionFailed.
    """
    if node.comfyui_url is not None:
        return
    if node.comfyui_dir is not None:
        existing_engine(node.cache_dir, node.comfyui_dir, node.comfyui_python)
    elif find_installed(node.cache_dir, node.engine_variant) is None:
        install_engine(node.cache_dir, variant=node.engine_variant, progress=progress)
    install_models(node.cache_dir, load_catalog(more=node.workflows_dir).models(), progress)


@contextmanager
def _services(node: NodeSettings, progress: Progress) -> Iterator[dict[str, str]]:
    """Start the services that the environment does not name, and yield their variables."""
    missing = [role for role, variable in _NAMED_BY.items() if not _is_set(variable)]
    own_issuer = not (os.environ.get("AUTH0_DOMAIN") or os.environ.get("LOCAL_ISSUER_URL"))
    started = [*missing, "issuer"] if own_issuer else missing
    progress(f"starting {', '.join(started) or 'nothing'}")
    ports: dict[str, int] = {}
    extra = [partial(_issuer, ports)] if own_issuer else []
    marked = mark(node.state_dir)
    with LocalServices(node.state_dir, only=missing, extra=extra, environ=marked) as services:
        addresses = {
            name: value
            for role in missing
            for name, value in service_variables(role, services.urls).items()
        }
        if own_issuer:
            addresses["LOCAL_ISSUER_URL"] = issuer_url(ports["issuer"])
        if not _is_set("WEBHOOK_SECRET"):
            addresses["WEBHOOK_SECRET"] = webhook_secret(node.state_dir)
        for name, value in _LOCAL_WEBHOOKS.items():
            addresses[name] = os.environ.get(name) or value
        addresses["COMFY_RESTORE_STATE"] = str(node.state_dir)
        addresses["COMFY_RESTORE_CACHE"] = str(node.cache_dir)
        yield addresses


def _is_set(variable: str) -> bool:
    return bool(os.environ.get(variable) or os.environ.get(variable + FILE_SUFFIX))


def service_variables(role: Role, urls: ServiceUrls) -> dict[str, str]:
    """Return the environment variables that describe a running service."""
    match role:
        case "postgres":
            return {"DATABASE_URL": urls.database_url}
        case "redis":
            return {"REDIS_URL": urls.redis_url}
        case "s3":
            return {
                "S3_ENDPOINT_URL": urls.s3_endpoint_url,
                "S3_BUCKET": urls.s3_bucket,
                "AWS_ACCESS_KEY_ID": urls.s3_access_key,
                "AWS_SECRET_ACCESS_KEY": urls.s3_secret_key,
            }


def _issuer(ports: dict[str, int], state: StateDir) -> Service:
    state.reserve(ports=["issuer"])
    ports["issuer"] = port = state.port("issuer")
    keys_url = f"{issuer_url(port)}/.well-known/jwks.json"
    folder = state.folder(issuer_folder(state.path).name)
    program = (sys.executable, "-m", "serve_app.auth.local_issuer")
    return Service(
        name="issuer",
        argv=(*program, "--state-dir", str(folder), "--port", str(port)),
        cwd=folder,
        probe=lambda: _answers(keys_url),
    )


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False
