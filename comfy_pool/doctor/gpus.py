"""Report this machine's GPUs and driver with `nvidia-smi`. Read-only."""

from __future__ import annotations

import subprocess

from comfy_pool.doctor.engine import Finding

_QUERY = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
_TIMEOUT_S = 20.0
_DRIVER = "install the NVIDIA driver, and in a container pass the GPU through (--gpus all)"


def examine_gpus(variant: str) -> list[Finding]:
    """Return one finding for each GPU, or a single one if `variant` is `cpu` or the query fails."""
    if variant == "cpu":
        return [Finding("GPU", True, "not used: ENGINE_VARIANT is cpu")]
    try:
        told = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except FileNotFoundError:
        return [
            Finding("GPU", False, "nvidia-smi was not found, so there is no NVIDIA driver", _DRIVER)
        ]
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("GPU", False, f"nvidia-smi does not run: {error}", _DRIVER)]
    if told.returncode != 0:
        reason = (told.stdout + told.stderr).strip()[-300:]
        return [Finding("GPU", False, reason, _DRIVER)]
    found: list[Finding] = []
    for index, line in enumerate(told.stdout.strip().splitlines()):
        name, memory, driver = (part.strip() for part in line.split(","))
        found.append(Finding(f"GPU {index}", True, f"{name}, {memory}, driver {driver}"))
    return found
