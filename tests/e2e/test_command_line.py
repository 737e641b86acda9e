"""The `restore` command against a running stack: its output, files and exit statuses.

`run_restore` fails a test that prints a traceback.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from PIL import Image

from restoration.jobs import JobStatus
from serve_app.client import RestorationClient
from tests.support.photos import degrade, jpeg, original
from tests.support.stack import Stack, run_restore

pytestmark = pytest.mark.real_engine


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a photo that takes `enlarge` a fraction of a second."""
    path = tmp_path_factory.mktemp("photos") / "photo.jpg"
    path.write_bytes(jpeg(degrade(original("flower")).crop((0, 0, 64, 48))))
    return path


@pytest.fixture
def client(stack: Stack) -> Iterator[RestorationClient]:
    """Yield a client for the user of the commands."""
    with stack.client("local") as client:
        yield client


def test_run_leaves_the_result_on_disk(stack: Stack, photo: Path, tmp_path: Path) -> None:
    """The exit status is 0, progress goes to standard error, and the suffix chooses the format."""
    out = tmp_path / "restored.webp"
    done = stack.restore(
        *("run", str(photo), "-o", str(out)),
        *("--workflow", "enlarge", "--param", "scale=2", "--param", "quality=70"),
    )
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"restored to {out}"
    with Image.open(out) as image:
        assert (image.format, image.size) == ("WEBP", (128, 96))
    shown = json.loads(stack.restore("show", newest_job(stack)).stdout)
    assert shown["status"] == "succeeded"
    assert shown["params"] == {"scale": 2, "strength": shown["params"]["strength"], "quality": 70}


def newest_job(stack: Stack) -> str:
    """Return the job's id, copied from the list as a user would."""
    return stack.restore("jobs", "--limit", "1").stdout.splitlines()[-1].split()[0]


def test_format_overrides_the_suffix(stack: Stack, photo: Path, tmp_path: Path) -> None:
    """--format decides the format, regardless of the file's name."""
    out = tmp_path / "restored.png"
    stack.restore("run", str(photo), "-o", str(out), "--workflow", "enlarge", "--format", "jpeg")
    with Image.open(out) as image:
        assert image.format == "JPEG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--workflow", "nope"],
            "the workflow 'nope' does not exist; choose from enlarge, restore",
        ),
        (["--param", "scale=99"], "scale: Input should be less than or equal to 4"),
        (["--param", "colour=red"], "colour: unknown parameter"),
        (["--server", "http://127.0.0.1:9"], "cannot reach http://127.0.0.1:9/api/v1/restorations"),
    ],
)
def test_run_says_in_one_line_what_is_wrong(
    stack: Stack, photo: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    """The exit status is 1, with one line of output and no file."""
    out = tmp_path / "restored.png"
    failed = stack.restore("run", str(photo), "-o", str(out), *options, check=False)
    assert_one_error(failed.returncode, failed.stderr, message)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_picture_is_refused_in_one_line(stack: Stack, photo: Path, tmp_path: Path) -> None:
    """The user sees the reason that the service gave."""
    broken, out = tmp_path / "broken.jpg", tmp_path / "restored.png"
    broken.write_bytes(photo.read_bytes()[:-200])
    failed = stack.restore("run", str(broken), "-o", str(out), check=False)
    assert_one_error(failed.returncode, failed.stderr, "the image cannot be decoded")
    assert not out.exists()


def assert_one_error(exit_status: int, stderr: str, message: str) -> None:
    assert exit_status == 1
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_jobs_can_be_filtered_by_status(stack: Stack, client: RestorationClient) -> None:
    """The list has no job with another status."""
    listed = stack.restore("jobs", "--status", "succeeded", "--limit", "5").stdout.splitlines()
    assert listed[0].split() == ["job", "status", "workflow", "created", "took"]
    for line in listed[1:]:
        assert client.get(line.split()[0]).status is JobStatus.SUCCEEDED


def test_cancel_returns_when_the_job_has_ended(stack: Stack, client: RestorationClient) -> None:
    """The exit status is 0 for a job cancelled now, and 1 for one that cannot be cancelled."""
    job = client.submit(jpeg(original("flower").resize((240, 160))))
    assert stack.restore("cancel", str(job.id)).stderr == f"job {job.id} cancelled\n"
    assert client.get(job.id).status is JobStatus.CANCELLED
    missing = stack.restore("cancel", str(uuid4()), check=False)
    assert_one_error(missing.returncode, missing.stderr, "the job does not exist")


def test_a_token_is_accepted_by_the_api(stack: Stack) -> None:
    """The printed token is sufficient for a request, and belongs to the given subject."""
    url = f"{stack.record.url}/api/v1/restorations"
    token = stack.restore("token", "--sub", "somebody").stdout.strip()
    with httpx.Client(trust_env=False) as http:
        assert http.get(url).status_code == 401
        answer = http.get(url, headers={"Authorization": f"Bearer {token}"})
    assert answer.json()["restorations"] == []


def test_doctor_finds_all_well(stack: Stack) -> None:
    """The exit status is 0 and all findings are ok, including one about the stack."""
    findings = stack.restore("doctor").stdout.splitlines()[1:]
    assert all(line.startswith("ok ") for line in findings)
    assert f"running at {stack.record.url}" in findings[-1]


def test_engine_install_is_quick_and_says_what_is_wrong(stack: Stack, tmp_path: Path) -> None:
    """An installed engine is left alone, and a folder without ComfyUI is named."""
    assert "are installed in" in stack.restore("engine", "install").stderr
    wrong = stack.restore(
        *("engine", "install", "--source", "path", "--path", str(tmp_path)), check=False
    )
    assert_one_error(wrong.returncode, wrong.stderr, f"{tmp_path} is not a ComfyUI checkout")


@pytest.mark.parametrize("how", [[], ["--detach"]])
def test_up_on_a_port_in_use_is_refused_in_one_line(tmp_path: Path, how: list[str]) -> None:
    """The port is named before anything is started."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        refused = run_restore(tmp_path, "up", *how, "--port", str(port), check=False)
    assert_one_error(refused.returncode, refused.stderr, f"port {port} is in use on this machine")
    assert list(tmp_path.iterdir()) == []


def test_without_a_stack_each_command_says_so(tmp_path: Path) -> None:
    """One line says what to do; `down` without a stack is no error."""
    for command in (["jobs"], ["show", str(uuid4())], ["token"]):
        failed = run_restore(tmp_path, *command, check=False)
        assert_one_error(failed.returncode, failed.stderr, "no local stack is running")
    assert "no local stack was running" in run_restore(tmp_path, "down").stderr
