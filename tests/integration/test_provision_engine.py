"""Installing the engine: idempotent, never half done, with clear errors.

The small installs here are real ones (environment, index, ComfyUI's tree), but require only one
small package, because the real list takes 6 GB.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from comfy_pool.doctor.engine import diagnose
from comfy_pool.install import engine
from comfy_pool.install.engine import (
    COMFYUI_VERSION,
    EngineInstall,
    comfy_cli_command,
    engine_folder,
    find_engine,
    find_installed,
    install_engine,
)
from comfy_pool.install.toolbox import toolbox
from restoration.errors import ProvisionFailed
from tests.support.locks import unhashed
from workflows.catalog import load_catalog

# Prints a line when the installation has begun, and then hangs.
STUCK_INSTALL = """
import sys
from pathlib import Path
from comfy_pool.install import engine

def hang(message):
    print(message, flush=True)
    sys.stdin.read()

engine.REQUIREMENTS = Path(sys.argv[2])
engine.install_engine(Path(sys.argv[1]), progress=hang)
"""

TOOL_LEFT_BEHIND = """
import sys
from pathlib import Path
from comfy_pool.install.toolbox import toolbox

with toolbox(Path(sys.argv[1]), print) as tools:
    tools.run([sys.executable, "-c", "import sys; open(sys.argv[1]).read()", sys.argv[2]], "it")
"""


@pytest.fixture
def requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "requirements.lock"
    path.write_text("einops==0.8.2\n")
    monkeypatch.setattr(engine, "REQUIREMENTS", path)
    return path


def unexpected(message: str) -> None:
    pytest.fail(f"something was done: {message}")


@pytest.mark.usefixtures("requirements")
def test_an_install_is_done_once(tmp_path: Path) -> None:
    """The first call installs an engine, and the second only returns it."""
    said: list[str] = []
    first = install_engine(tmp_path, progress=said.append)
    assert len(said) == 2
    assert first.version == COMFYUI_VERSION
    assert first.models_dir == tmp_path / "models"
    assert (first.app_dir / "main.py").is_file()
    assert not (first.app_dir / "extra_model_paths.yaml").exists()
    subprocess.run([first.python, "-c", "import einops"], check=True)
    assert install_engine(tmp_path, progress=unexpected) == first


def test_a_killed_install_never_looks_finished(tmp_path: Path, requirements: Path) -> None:
    """After a SIGKILL in the middle nothing counts as installed, and the next call repairs it."""
    with subprocess.Popen(
        [sys.executable, "-c", STUCK_INSTALL, str(tmp_path), str(requirements)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.kill()
    folder = engine_folder(tmp_path)
    assert folder.is_dir()
    assert find_engine(folder, tmp_path) is None
    (folder / "leftover").touch()
    assert find_engine(folder, tmp_path) is None
    install = install_engine(tmp_path)
    assert install.app_dir == folder / "app"
    assert not (folder / "leftover").exists()


def test_tools_left_behind_hold_the_lock(tmp_path: Path) -> None:
    """No other install begins while a killed install's tool still writes into the folder."""
    lock, pipe = tmp_path / "lock", tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-c", TOOL_LEFT_BEHIND, str(lock), str(pipe)]
    with subprocess.Popen(command) as process, pipe.open("wb"):  # opens once the tool reads
        process.kill()
        process.wait()
        with lock.open("ab") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with toolbox(lock, lambda _: None) as tools:  # the tool has ended with its pipe
        tools.run(["true"], "nothing")


def test_an_engine_whose_python_is_gone_is_not_there(tmp_path: Path, requirements: Path) -> None:
    """A receipt without an interpreter does not count, so that the engine is installed again."""
    install = install_engine(tmp_path)
    install.python.unlink()
    assert find_engine(engine_folder(tmp_path), tmp_path) is None


def test_a_torn_receipt_is_none(tmp_path: Path) -> None:
    """After a power failure the engine is installed again instead of being refused forever."""
    folder = engine_folder(tmp_path)
    folder.mkdir()
    (folder / "installed.json").write_bytes(b"")
    assert find_engine(folder, tmp_path) is None


def test_other_pins_mean_another_folder(tmp_path: Path, requirements: Path) -> None:
    """A changed lock file does not touch the engine that older code still runs."""
    before = engine_folder(tmp_path)
    requirements.write_text("einops==0.8.1\n")
    assert engine_folder(tmp_path) != before


def test_hashes_do_not_name_the_folder(tmp_path: Path, requirements: Path) -> None:
    """Adding hashes for another platform to the lock does not change the engine."""
    before = engine_folder(tmp_path)
    requirements.write_text(f"einops==0.8.2 \\\n    --hash=sha256:{'0' * 64}\n")
    assert engine_folder(tmp_path) == before


def test_a_package_that_is_not_the_locked_one_is_refused(
    tmp_path: Path, requirements: Path
) -> None:
    """Name and version match but the sha256 does not, so nothing is installed."""
    requirements.write_text(f"einops==0.8.2 \\\n    --hash=sha256:{'0' * 64}\n")
    with pytest.raises(ProvisionFailed, match=r"(?i)hash"):
        install_engine(tmp_path)
    assert find_engine(engine_folder(tmp_path), tmp_path) is None


def test_every_package_of_the_engine_is_locked_by_hash() -> None:
    """The shipped lock has a hash for each file that may be installed."""
    assert unhashed(engine.REQUIREMENTS.read_text()) == []


def test_a_failure_says_what_the_tool_said(tmp_path: Path, requirements: Path) -> None:
    """The error is one line with the end of pip's output, after uv has failed first."""
    requirements.write_text("einops==0.0.0.dev0\n")
    said: list[str] = []
    with pytest.raises(ProvisionFailed, match=r"installing packages failed .*einops") as caught:
        install_engine(tmp_path, progress=said.append)
    assert "\n" not in caught.value.message
    assert "uv failed" in said[-1]
    assert find_engine(engine_folder(tmp_path), tmp_path) is None


def a_checkout(folder: Path, version: str = '__version__ = "9.9.9"\n') -> Path:
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").touch()
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text(version)
    return folder


def test_an_existing_checkout_is_used_as_it_is(tmp_path: Path) -> None:
    """The source `path` installs nothing, and finds the version and the checkout's own Python."""
    app = a_checkout(tmp_path / "ComfyUI")
    found = install_engine(tmp_path / "cache", source="path", checkout=app, progress=unexpected)
    assert found == EngineInstall(
        app / ".venv" / "bin" / "python", app, tmp_path / "cache" / "models", "9.9.9"
    )
    assert not (tmp_path / "cache").exists()
    python = Path(sys.executable)
    chosen = install_engine(tmp_path, source="path", checkout=app, checkout_python=python)
    assert chosen.python == python


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        ("main.py", "main.py is missing"),
        (".venv/bin/python", "neither .venv nor venv"),
        ("comfyui_version.py", r"comfyui_version.py is missing"),
    ],
)
def test_what_is_no_checkout_is_refused(tmp_path: Path, spoil: str, problem: str) -> None:
    """A folder that cannot be started is refused, and the error names what it lacks."""
    app = a_checkout(tmp_path / "ComfyUI")
    (app / spoil).unlink()
    with pytest.raises(ProvisionFailed, match=problem):
        install_engine(tmp_path, source="path", checkout=app)


def test_a_version_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A version file without a version is refused, and so is a missing folder setting."""
    with pytest.raises(ProvisionFailed, match="contains no version"):
        install_engine(tmp_path, source="path", checkout=a_checkout(tmp_path / "a", "nothing"))
    with pytest.raises(ProvisionFailed, match="COMFYUI_DIR"):
        install_engine(tmp_path, source="path")


def test_comfy_cli_is_asked_for_the_pinned_release() -> None:
    """comfy-cli installs the pinned version for the chosen device without prompting."""
    command = comfy_cli_command(Path("/tool/comfy"), Path("/cache/app"), "cuda")
    assert list(map(str, command)) == [
        *("/tool/comfy", "--skip-prompt", "--workspace", "/cache/app"),
        *("install", "--version", COMFYUI_VERSION, "--skip-manager", "--nvidia"),
    ]
    assert comfy_cli_command(Path("comfy"), Path("app"), "cpu")[-1] == "--cpu"


def test_the_doctor_says_what_is_missing(tmp_path: Path) -> None:
    """On an empty cache every part is reported missing, with the command that installs it."""
    findings = diagnose(tmp_path, load_catalog())
    assert len(findings) == 3
    assert not any(finding.ok for finding in findings)
    assert all("restore engine install" in finding.remedy for finding in findings)
    assert list(tmp_path.iterdir()) == []


def test_comfys_own_release_is_taken_where_somebody_asked_for_it(tmp_path: Path) -> None:
    """Workers, `restore up` and the doctor use the same engine, and do not ask for another."""
    assert find_installed(tmp_path, "cpu") is None
    folder = engine_folder(tmp_path, "comfy-cli", "cpu")
    a_checkout(folder / "app")
    receipt = {"python": "app/.venv/bin/python", "app_dir": "app", "version": "9.9.9"}
    (folder / "installed.json").write_text(json.dumps(receipt))
    found = find_installed(tmp_path, "cpu")
    assert found is not None
    assert found.app_dir == folder / "app"
    assert "no ComfyUI" not in diagnose(tmp_path, load_catalog())[0].detail


def test_the_doctor_never_offers_to_remove_a_checkout(tmp_path: Path) -> None:
    """A checkout belongs to its owner, so the doctor does not offer to remove it."""
    app = a_checkout(tmp_path / "ComfyUI")
    engine = diagnose(tmp_path, load_catalog(), checkout=app)[0]
    assert not engine.ok
    assert "remove" not in engine.remedy
    missing = diagnose(tmp_path, load_catalog(), checkout=tmp_path / "none")[0]
    assert "COMFYUI_DIR" in missing.remedy
