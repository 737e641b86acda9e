"""The corpus of unusual files through the complete system: each gets the documented answer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from PIL import Image

from restoration.jobs import JobStatus
from serve_app.auth.scopes import USER_SCOPES, Scope
from serve_app.client import RestorationClient
from serve_app.schemas.restorations import Restoration
from tests.corpus import Case, Refused, corpus, difference, slug, table
from tests.support.stack import Stack
from tests.support.stack_processes import Process, engines

CASES = {slug(case): case for case in corpus()}
ACCEPTED = [name for name, case in CASES.items() if isinstance(case.expected, Image.Image)]
REFUSED = [name for name, case in CASES.items() if isinstance(case.expected, Refused)]
SCALE = 2
FLIP = "y-axis: horizontally"
TOLERANCE = 30  # of 255, in the middle of a quarter, because JPEG and the model blur

pytestmark = pytest.mark.real_engine


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[RestorationClient]:
    with stack.client("corpus") as client:
        yield client


@pytest.fixture(scope="module")
def engines_before(stack: Stack) -> dict[int, Process]:
    return engines(stack.state_dir)


@pytest.fixture(scope="module")
def answers(stack: Stack, engines_before: object) -> Mapping[str, httpx.Response]:
    """Send all files of the corpus one after another, and return the answers."""
    with stack.http("corpus") as http:
        return {name: submit(http, case) for name, case in CASES.items()}


def submit(http: httpx.Client, case: Case) -> httpx.Response:
    return http.post(
        "/api/v1/restorations",
        files={"image": (case.name, case.data, case.content_type)},
        data={"workflow": "enlarge", "params": f'{{"scale": {SCALE}}}', "output_format": "png"},
    )


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_with_a_code_that_says_why(
    answers: Mapping[str, httpx.Response], name: str
) -> None:
    """The answer is a problem with the documented status and code and a longer detail; no job
    exists."""
    expected, answer = CASES[name].expected, answers[name]
    assert isinstance(expected, Refused)
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (expected.status, expected.code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(problem["detail"]) > 10


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_file_is_restored_as_a_person_expects(
    client: RestorationClient, answers: Mapping[str, httpx.Response], name: str, tmp_path: Path
) -> None:
    """The result is upright, with the right colours and transparency, at the first attempt."""
    expected = CASES[name].expected
    assert isinstance(expected, Image.Image)
    assert answers[name].status_code == 202, answers[name].text
    job = client.wait(Restoration.model_validate(answers[name].json()).id)
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 1), job.failure
    client.download(job.id, tmp_path / "result.png")
    with Image.open(io.BytesIO((tmp_path / "result.png").read_bytes())) as result:
        assert result.has_transparency_data == expected.has_transparency_data
        assert result.size == (SCALE * expected.width, SCALE * expected.height)
        assert difference(result.convert(expected.mode), expected) < TOLERANCE
        assert is_grey(result) == is_grey(expected)


def is_grey(picture: Image.Image) -> bool:
    """Return whether R, G and B of each pixel are equal."""
    red, green, blue = picture.convert("RGB").split()
    return red == green == blue


def test_no_file_costs_an_engine(
    stack: Stack, answers: Mapping[str, httpx.Response], engines_before: dict[int, Process]
) -> None:
    """The engines are the same processes as before, and no refused file became a job."""
    assert engines(stack.state_dir) == engines_before
    with stack.http("corpus") as http:
        listed = http.get("/api/v1/restorations", params={"limit": 100}).json()["restorations"]
    assert len(listed) == len(ACCEPTED)


def test_the_documented_answers_are_these() -> None:
    """`docs/inputs.md` contains the table of the corpus."""
    assert table() in Path("docs/inputs.md").read_text()


@pytest.mark.images
def test_a_graph_that_moves_pixels_moves_no_transparency(stack: Stack) -> None:
    """A flipped and padded picture has no transparency left: its transparent right half becomes
    white on the left. Feathering that would take minutes is skipped, because no node uses its
    mask."""
    photo = Image.new("RGBA", (600, 400), (200, 0, 0, 255))
    photo.paste((0, 0, 200, 0), (300, 0, 600, 400))
    file = io.BytesIO()
    photo.save(file, "PNG")
    pad = {"left": 100, "right": 0, "top": 0, "bottom": 0, "feathering": 199}
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "image"}},
        "2": {"class_type": "ImageFlip", "inputs": {"image": ["1", 0], "flip_method": FLIP}},
        "3": {"class_type": "ImagePadForOutpaint", "inputs": {"image": ["2", 0], **pad}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x"}},
    }
    with stack.http("runner", (*USER_SCOPES, Scope.RUN)) as http:
        answer = http.post(
            "/api/v1/runs",
            files={"image": ("p.png", file.getvalue(), "image/png")},
            data={"graph": json.dumps(graph)},
            headers={"Prefer": "wait=60", "Accept": "image/png"},
        )
    assert answer.headers["content-type"] == "image/png", answer.text
    with Image.open(io.BytesIO(answer.content)) as result:
        assert (result.size, result.has_transparency_data) == ((700, 400), False)
        assert result.getpixel((250, 200)) == (255, 255, 255)
        assert result.getpixel((550, 200)) == (200, 0, 0)
