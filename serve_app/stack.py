"""The local stack: services, token issuer, Ray and the Serve application, as one process tree.

`restore up` is its parent. Whatever has an address in the environment is used and not started.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import httpx

from comfy_pool.models import install_models
from comfy_pool.packages import Progress
from comfy_pool.provision import existing_engine, find_installed, install_engine
from persistence.embedded.local import LocalServices, Role, ServiceUrls
from persistence.embedded.service import Service
from persistence.embedded.state import StateDir
from persistence.embedded.supervisor import exit_on_sigterm
from persistence.migrate import upgrade
from restoration.errors import DependencyUnavailable
from restoration.settings import FILE_SUFFIX, NodeSettings, load_node_settings, load_settings
from serve_app.local_issuer import issuer_url
from serve_app.stack_record import (
    StackOptions,
    StackRecord,
    issuer_folder,
    recorded,
    webhook_secret,
)
from workflows.catalog import load_catalog

if TYPE_CHECKING:
    from serve_app.deployment import RayAddresses

READY_TIMEOUT_S = 180.0
_POLL_S = 0.1
# a service whose variable is set runs elsewhere
_NAMED_BY: Mapping[Role, str] = {
    "postgres": "DATABASE_URL",
    "redis": "REDIS_URL",
    "s3": "S3_BUCKET",
}
# receivers are on this machine as well
_LOCAL_WEBHOOKS = {"WEBHOOK_ALLOW_HTTP": "true", "WEBHOOK_NETWORKS": "127.0.0.0/8,::1/128"}


def run_stack(
    options: StackOptions, progress: Progress, on_ready: Callable[[StackRecord], None]
) -> None:
    """Start everything, call `on_ready`, serve until SIGINT or SIGTERM, and stop everything.

    Ends by KeyboardInterrupt or SystemExit. Raises SetupError, DependencyUnavailable.
    """
    node = load_node_settings(os.environ)
    with exit_on_sigterm(), _services(node, progress) as addresses:
        os.environ.update(addresses)  # every process that Ray starts inherits them
        settings = load_settings(os.environ)
        upgrade(settings.database_url.get_secret_value())
        provide_engine(node, progress)
        with _cluster(node, options, progress) as ray:
            url = f"http://127.0.0.1:{options.port}"
            _wait_until_ready(url)
            issuer = None if settings.auth0_domain else settings.local_issuer_url
            record = StackRecord(os.getpid(), url, ray.gcs, issuer, ray.metrics)
            with recorded(node.state_dir, record):
                on_ready(record)
                threading.Event().wait()


def provide_engine(node: NodeSettings, progress: Progress) -> None:
    """Install the engine and the models unless they are there, or are somebody else's.

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
    """The services that the environment does not name; yields their variables."""
    missing = [role for role, variable in _NAMED_BY.items() if not _is_set(variable)]
    own_issuer = not (os.environ.get("AUTH0_DOMAIN") or os.environ.get("LOCAL_ISSUER_URL"))
    progress(f"starting {', '.join([*missing, *(['issuer'] if own_issuer else [])]) or 'nothing'}")
    ports: dict[str, int] = {}
    extra = [partial(_issuer, ports)] if own_issuer else []
    with LocalServices(node.state_dir, only=missing, extra=extra) as services:
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
    """What the environment says of a service that runs."""
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
    return Service(
        name="issuer",
        argv=(
            *(sys.executable, "-m", "serve_app.local_issuer"),
            *("--state-dir", str(folder), "--port", str(port)),
        ),
        cwd=folder,
        probe=lambda: _answers(keys_url),
    )


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


@contextmanager
def _cluster(
    node: NodeSettings, options: StackOptions, progress: Progress
) -> Iterator[RayAddresses]:
    # Ray takes seconds to import, and most commands do without.
    from serve_app.deployment import PoolArgs, start_local, stop_local

    progress(f"starting Ray and the service, GPU workers: {options.workers}")
    args = PoolArgs(
        workers_min=options.workers,
        workers_max=options.workers,
        worker_gpus=0 if node.engine_variant == "cpu" or node.comfyui_url else 1,
        worker_depth=node.worker_depth,
        worker_cpus=0,  # how many engines this machine bears is for its owner to say
        ingress_replicas=1,
        dispatcher_replicas=2,  # one that dies is replaced in seconds, but jobs would wait for it
        drain_s=node.drain_s,
    )
    try:
        yield start_local(args, options.port)
    finally:
        progress("stopping")
        stop_local()


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not _answers(f"{url}/readyz"):
        if time.monotonic() > deadline:
            raise DependencyUnavailable(f"{url}/readyz is not ready; see the log of the ingress")
        time.sleep(_POLL_S)
