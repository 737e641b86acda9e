"""The engine and the models that the other tests use are complete, and installed only once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from comfy_pool.doctor.engine import diagnose
from comfy_pool.install.engine import COMFYUI_VERSION, install_engine
from comfy_pool.install.models import install_models
from workflows.catalog import load_catalog

pytestmark = pytest.mark.real_engine
CATALOG = load_catalog()


@pytest.fixture(scope="module")
def cache_dir() -> Path:
    """Install into the user's own cache, so that 6 GB are downloaded only once."""
    folder = Path(os.environ.get("COMFY_RESTORE_CACHE", "~/.cache/comfy-restore")).expanduser()
    install_engine(folder)
    install_models(folder, CATALOG.models())
    return folder


def unexpected(message: str) -> None:
    pytest.fail(f"something was done: {message}")


def test_a_second_install_does_nothing(cache_dir: Path) -> None:
    """With everything installed, an install returns it and changes nothing."""
    first = install_engine(cache_dir, progress=unexpected)
    assert install_engine(cache_dir, progress=unexpected) == first
    assert install_models(cache_dir, CATALOG.models(), unexpected) == first.models_dir


def test_the_models_are_the_manifests(cache_dir: Path) -> None:
    """Models converted from the wheel have the sha256 and the size in the manifests."""
    CATALOG.check_models(cache_dir / "models")
    for model in CATALOG.models():
        path = cache_dir / "models" / model.folder / model.name
        assert path.stat().st_size == model.size_bytes


def test_the_doctor_finds_nothing_wrong(cache_dir: Path) -> None:
    """The engine's environment imports torch, and nothing needs a repair."""
    findings = diagnose(cache_dir, CATALOG)
    assert all(finding.ok and not finding.remedy for finding in findings), findings
    assert COMFYUI_VERSION in findings[0].detail
