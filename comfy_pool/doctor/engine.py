"""Diagnose an installation: report each part, and how to fix it. Read-only."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import httpx

from comfy_pool.install.engine import (
    EngineInstall,
    Variant,
    engine_folder,
    existing_engine,
    find_installed,
    models_dir,
)
from comfy_pool.process.hosts import START_FAILURE
from comfy_pool.process.process import LOG_FILE
from comfy_pool.protocol.messages import MalformedMessage
from comfy_pool.protocol.responses import parse_system_stats
from restoration.errors import ProvisionFailed
from workflows.catalog import Catalog, model_problem

INSTALL = "run `restore engine install`"
_PROBE = "import torch; print(torch.__version__, torch.cuda.is_available())"
_PROBE_TIMEOUT_S = 60.0
_ANSWER_TIMEOUT_S = 5.0
_LOG_LINES = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a diagnosis.

    `detail` describes the state. `remedy` is empty if `ok`.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def diagnose(
    cache_dir: Path,
    catalog: Catalog,
    checkout: Path | None = None,
    checkout_python: Path | None = None,
    variant: Variant = "cpu",
) -> list[Finding]:
    """Check the engine (the one at `checkout` if given) and every model of the catalog.

    Takes seconds: it imports torch in the engine's environment and hashes the models.
    """
    if checkout is None:
        findings = [_installed(cache_dir, variant)]
    else:
        findings = [_checkout(cache_dir, checkout, checkout_python)]
    for model in catalog.models():
        name, problem = f"model {model.name}", model_problem(model, models_dir(cache_dir))
        if problem is None:
            detail = f"{model.size_bytes / 1e6:.1f} MB, sha256 matches its manifest"
            findings.append(Finding(name, True, detail))
        else:
            findings.append(Finding(name, False, problem, INSTALL))
    return findings


def examine_starts(engines_dir: Path) -> list[Finding]:
    """Report the last start of each engine with a base directory in `engines_dir`."""
    findings: list[Finding] = []
    for base_dir in sorted(engines_dir.glob("*/")):
        name, log = f"engine {base_dir.name}", base_dir / LOG_FILE
        if failure := _lines(base_dir / START_FAILURE):
            detail = "\n".join([*failure, *_lines(log)[-_LOG_LINES:]])
            findings.append(Finding(name, False, detail, f"read {log}"))
        else:
            detail = f"its last start succeeded; its log is {log}"
            findings.append(Finding(name, True, detail))
    return findings


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def examine_attached(base_url: str) -> Finding:
    """Check that the attached ComfyUI at `base_url` answers."""
    try:
        answer = httpx.get(f"{base_url}/system_stats", timeout=_ANSWER_TIMEOUT_S, trust_env=False)
        version = parse_system_stats(answer.raise_for_status().content).version
    except (httpx.HTTPError, httpx.InvalidURL, MalformedMessage) as error:
        detail = f"no ComfyUI responds at {base_url}: {error}"
        return Finding("engine", False, detail, "start ComfyUI, or correct COMFYUI_URL")
    return Finding("engine", True, f"ComfyUI {version} responds at {base_url}")


def _checkout(cache_dir: Path, checkout: Path, python: Path | None) -> Finding:
    try:
        install = existing_engine(cache_dir, checkout, python)
    except ProvisionFailed as error:
        return Finding("engine", False, error.message, "correct COMFYUI_DIR")
    return _torch(install, f"repair the environment of {install.python}")


def _installed(cache_dir: Path, variant: Variant) -> Finding:
    found = find_installed(cache_dir, variant)
    if found is None:
        return Finding("engine", False, f"no ComfyUI in {engine_folder(cache_dir)}", INSTALL)
    return _torch(found, f"remove {found.app_dir.parent} and {INSTALL}")


def _torch(install: EngineInstall, remedy: str) -> Finding:
    """Check that torch imports, without which ComfyUI cannot start."""
    try:
        probe = subprocess.run(
            [install.python, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("engine", False, f"{install.python} does not run: {error}", remedy)
    if probe.returncode != 0:
        return Finding("engine", False, f"torch cannot be imported: {probe.stderr[-300:]}", remedy)
    torch, cuda = probe.stdout.split()
    device = "with CUDA" if cuda == "True" else "on the CPU"
    return Finding("engine", True, f"ComfyUI {install.version}, torch {torch}, {device}")
