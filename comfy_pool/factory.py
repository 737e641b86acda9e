"""Build and start an engine from settings and a GPU, and check that it can run every workflow."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from comfy_pool.engine import ComfyEngine
from comfy_pool.install.engine import EngineInstall, existing_engine, find_installed
from comfy_pool.limits import EngineLimits
from comfy_pool.pixels import pixels_folder
from comfy_pool.process.hosts import AttachedHost, EngineHost, OwnedHost
from comfy_pool.process.process import EngineCommand
from comfy_pool.process.slots import Slot, acquire_slot
from restoration.errors import ProvisionFailed
from restoration.settings import STACK_MARK, NodeSettings
from workflows.catalog import Catalog

# An engine runs third-party code, so it gets the variables that it needs to find its GPU and no
# secrets.
_PASSED_ON = {
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "XDG_CACHE_HOME",
    STACK_MARK,  # `restore down` finds the engine by it
}
_PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "HSA_", "HIP_", "ROCR_", "PYTORCH_", "OMP_", "MKL_")


@asynccontextmanager
async def engine_on_this_node(
    settings: NodeSettings, catalog: Catalog, gpu_ids: Sequence[int | str], *, whole_gpu: bool
) -> AsyncIterator[ComfyEngine]:
    """Yield a started engine and close it on exit.

    Use the ComfyUI at `comfyui_url` if that is set. Otherwise start an owned engine on port
    `engine_base_port` plus its slot number (8188 by default).

    Raises SetupError if a model or a node class of the catalog is missing, or no ComfyUI is
    installed; EngineUnavailable if the engine does not start or no slot is free.
    """
    defaults = EngineLimits()
    limits = replace(
        defaults,
        stall_s=settings.engine_stall_s,
        unreachable_s=min(defaults.unreachable_s, settings.engine_stall_s),
        restart_after_runs=settings.engine_restart_after_jobs,
        memory_limit_bytes=settings.engine_memory_limit_mb * 1_000_000,
    )
    async with AsyncExitStack() as resources:
        host: EngineHost
        if settings.comfyui_url is not None:
            host = AttachedHost(settings.comfyui_url)
        else:
            install = installed_engine(settings)
            await asyncio.to_thread(catalog.check_models, install.models_dir)
            slot = await acquire_slot(
                gpu_ids,
                slots_dir(settings),
                whole_gpu=whole_gpu,
                base_port=settings.engine_base_port,
            )
            resources.enter_context(slot)
            base_dir = engines_dir(settings) / str(slot.port)
            pixels = resources.enter_context(pixels_folder(str(slot.port), base_dir))
            host = OwnedHost(
                _command(settings, install, slot, base_dir, pixels),
                slot=slot.index,
                start_timeout_s=settings.engine_start_timeout_s,
            )
        async with ComfyEngine(host, limits) as engine:
            catalog.check_nodes(await engine.node_classes())
            yield engine


def engines_dir(settings: NodeSettings) -> Path:
    """Return the folder that holds this node's engine base directories, named by port."""
    return settings.state_dir / "engines"


def slots_dir(settings: NodeSettings) -> Path:
    """Return the folder of the port leases, shared by all stacks that use this cache."""
    return settings.cache_dir / "slots"


def installed_engine(settings: NodeSettings) -> EngineInstall:
    """Return the ComfyUI to start: the one at `comfyui_dir` if set, otherwise the installed one.

    Raises ProvisionFailed, with the command to run if none is installed.
    """
    if settings.comfyui_dir is not None:
        return existing_engine(settings.cache_dir, settings.comfyui_dir, settings.comfyui_python)
    if (install := find_installed(settings.cache_dir, settings.engine_variant)) is not None:
        return install
    raise ProvisionFailed(
        f"no ComfyUI is installed in {settings.cache_dir}; run `restore engine install`"
    )


def _command(
    settings: NodeSettings, install: EngineInstall, slot: Slot, base_dir: Path, pixels: Path
) -> EngineCommand:
    environ = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    if slot.cuda_visible_devices is not None:
        environ["CUDA_VISIBLE_DEVICES"] = slot.cuda_visible_devices
    nodes: list[Path] = []
    if (folder := settings.custom_nodes_dir) is not None:
        nodes = sorted(path for path in folder.iterdir() if (path / "__init__.py").is_file())
    return EngineCommand(
        python=install.python,
        app_dir=install.app_dir,
        base_dir=base_dir,
        models_dir=install.models_dir,
        port=slot.port,
        variant=settings.engine_variant,
        environ=environ,
        inherit_fds=(slot.fd,),
        pixels_dir=pixels,
        nodes=tuple(nodes),
    )
