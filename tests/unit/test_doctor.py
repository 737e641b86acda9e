"""The checks of `restore doctor`: GPUs, services and the clock."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from comfy_pool.doctor.gpus import examine_gpus
from restoration.settings import load_node_settings
from serve_app.cli.doctor import examine
from serve_app.cli.doctor_services import CLOCK_OFF_S, clock_finding, examine_services


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the only folder that PATH names."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def _nvidia_smi(path: Path, script: str) -> None:
    program = path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.fleet
def test_each_gpu_is_named_with_its_driver(path: Path) -> None:
    """Each line of nvidia-smi gives one GPU, in its order."""
    _nvidia_smi(path, "echo 'NVIDIA A10G, 23028 MiB, 570.86'; echo 'NVIDIA L4, 23034 MiB, 570.86'")
    found = examine_gpus("cuda")
    assert [(each.name, each.ok, each.detail) for each in found] == [
        ("GPU 0", True, "NVIDIA A10G, 23028 MiB, driver 570.86"),
        ("GPU 1", True, "NVIDIA L4, 23034 MiB, driver 570.86"),
    ]


@pytest.mark.fleet
@pytest.mark.parametrize("script", [None, "echo 'no devices were found'; exit 6"])
def test_a_missing_gpu_has_a_mend(path: Path, script: str | None) -> None:
    """A remedy is given without a driver, and with one that finds no GPU."""
    if script is not None:
        _nvidia_smi(path, script)
    [found] = examine_gpus("cuda")
    assert not found.ok
    assert "NVIDIA driver" in found.remedy


@pytest.mark.fleet
def test_no_gpu_is_missed_where_engines_run_on_the_cpu() -> None:
    """The default variant needs no GPU."""
    [found] = examine_gpus("cpu")
    assert found.ok


@pytest.mark.fleet
async def test_an_attached_engine_is_asked_and_nothing_is_installed_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With COMFYUI_URL the engine is external, so only its answer is checked."""
    monkeypatch.setenv("COMFYUI_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("COMFY_RESTORE_CACHE", str(tmp_path))
    found = await asyncio.to_thread(examine, load_node_settings(os.environ))
    assert [each.detail for each in found if "engine install" in each.remedy] == []
    [engine] = [each for each in found if each.name == "engine"]
    assert (engine.ok, engine.remedy) == (False, "start ComfyUI, or correct COMFYUI_URL")


@pytest.mark.fleet
async def test_services_that_do_not_answer_have_a_mend() -> None:
    """Each service is named with the settings to correct; an unreadable clock is left out."""
    nobody = {
        "DATABASE_URL": "postgresql://u:hunter2@127.0.0.1:9/d",
        "REDIS_URL": "redis://127.0.0.1:9",
        "S3_BUCKET": "photos",
        "S3_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "LOCAL_ISSUER_URL": "http://127.0.0.1:9",
        "PATH": os.environ["PATH"],
    }
    found = await examine_services(nobody)
    assert [(each.name, each.ok) for each in found] == [
        *(("Postgres", False), ("Redis", False), ("S3", False))
    ]
    assert all(each.remedy for each in found)
    assert "hunter2" not in str(found)


@pytest.mark.fleet
async def test_settings_that_do_not_load_are_said_so() -> None:
    """The variable is named; without any, the local stack brings its own services."""
    [found] = await examine_services({"DATABASE_URL": "postgresql://u@h/d"})
    assert (found.name, found.ok) == ("settings", False)
    assert "REDIS_URL" in found.detail
    assert await examine_services({}) == []


@pytest.mark.fleet
def test_a_clock_that_is_off_has_a_mend() -> None:
    """Tokens and signed URLs depend on it."""
    assert clock_finding(CLOCK_OFF_S).ok
    off = clock_finding(90)
    assert (off.ok, off.detail) == (False, "90 s off the clock of Postgres")
    assert "NTP" in off.remedy
