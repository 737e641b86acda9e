"""Users' own graphs against the running service, valid and hostile ones."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from restoration.jobs import JobStatus
from serve_app.auth.scopes import USER_SCOPES, Scope
from tests.fakes.site import API
from tests.support.pictures import file, noise
from tests.support.stack import Stack
from tests.unit.test_graphs import Graph, graph, node, scale
from workflows.node_classes import COMBO, NODE_CLASSES

pytestmark = pytest.mark.real_engine
RUNS = "/api/v1/runs"
PHOTO = noise()


@pytest.fixture
def runner(stack: Stack) -> Iterator[httpx.Client]:
    with stack.http("runner", (*USER_SCOPES, Scope.RUN)) as http:
        yield http


def send(http: httpx.Client, sent: Graph, **headers: str) -> httpx.Response:
    files = {"image": ("photo.png", file(PHOTO, "PNG"))}
    return http.post(RUNS, files=files, data={"graph": json.dumps(sent)}, headers=headers)


@pytest.mark.runs
def test_a_graph_of_ones_own_runs(stack: Stack, runner: httpx.Client, tmp_path: Path) -> None:
    """A graph uses the same queue, events and results as any job."""
    answer = send(runner, graph(node("ImageInvert"), scale(2.0)))
    assert answer.status_code == 202, answer.text
    with stack.client("runner") as client:
        job = client.wait(answer.json()["id"])
        assert job.status is JobStatus.SUCCEEDED, job.failure
        assert job.workflow == "custom"
        client.download(job.id, tmp_path / "result.png")
    with Image.open(tmp_path / "result.png") as result:
        assert result.size == (128, 96)
    inverted = send(runner, graph(node("ImageInvert")), Prefer="wait=50")
    content = runner.get(inverted.json()["links"]["result"], params={"download": 1}).content
    with Image.open(io.BytesIO(content)) as result:
        inverse = 255 - np.asarray(PHOTO).astype(int)
        assert np.abs(np.asarray(result) - inverse).max() <= 1  # the rounding of ComfyUI


def test_an_export_with_a_preview_runs(runner: httpx.Client) -> None:
    """The graph is wrapped as the editor sends it to ComfyUI, and has a node that only displays."""
    sent = graph(scale(2)) | {"p": node("PreviewImage", images=["2", 0])}
    answer = send(runner, {"prompt": sent, "client_id": "x"}, Prefer="wait=50")
    assert (answer.status_code, answer.json()["status"]) == (200, JobStatus.SUCCEEDED)


@pytest.mark.runs
def test_every_allowed_node_is_one_that_the_engine_has(stack: Stack, runner: httpx.Client) -> None:
    """The default list has the names of stock ComfyUI's classes."""
    known = httpx.get(f"{stack.comfyui_url()}/object_info", timeout=300, trust_env=False).json()
    problem = send(runner, graph(node("Nothing"))).json()["details"]["problem"]
    allowed = problem.partition("choose from ")[2].split(", ")
    assert len(allowed) > 10
    assert set(allowed) <= set(known)
    outputs = {name for name in allowed if known[name]["output_node"]}
    assert outputs == {"SaveImage"}


@pytest.mark.parametrize("name", sorted(NODE_CLASSES))
def test_a_class_has_the_inputs_that_the_engine_says(stack: Stack, name: str) -> None:
    """The inputs that graphs are checked against are those of the engine's release."""
    url = f"{stack.comfyui_url()}/object_info/{name}"
    known = httpx.get(url, timeout=60, trust_env=False).json()[name]
    inputs = {**known["input"].get("required", {}), **known["input"].get("optional", {})}
    kinds = {each: COMBO if isinstance(kind[0], list) else kind[0] for each, kind in inputs.items()}
    assert kinds == NODE_CLASSES[name].inputs
    assert tuple(known["output"]) == NODE_CLASSES[name].outputs


HOSTILE: dict[str, Graph] = {
    "a file of the host": graph() | {"1": node("LoadImage", image="/etc/passwd")},
    "another's file": graph() | {"1": node("LoadImage", image="comfy-restore/x/input.png")},
    "an output": graph() | {"1": node("LoadImage", image="image [output]")},
    "a way up": graph(node("ImageBlur", note="../../output")),
    "a place to write": graph()
    | {"2": node("SaveImage", images=["1", 0], filename_prefix="/srv/pwned")},
    "a second place to write": graph() | {"x": node("SaveImage", images=["1", 0])},
    "another writer": graph() | {"x": node("SaveAnimatedPNG", images=["1", 0])},
    "code": graph(node("SaveSVGNode", svg="<svg/>")),
    "a pickle": graph() | {"x": node("UpscaleModelLoader", model_name="evil.pth")},
    "an address": graph(node("ImageBlur", url="http://169.254.169.254/latest/meta-data")),
    "a circle": graph(node("ImageInvert", image=["2", 0])),
    "a huge picture": graph(scale(8), scale(8), scale(8), scale(8), scale(8)),
    "a huge picture, as a text": graph(scale("8")),
    "an input that ComfyUI ignores but runs": graph(node("ImageInvert", x=["1", 0])),
    "a mask for a picture": graph(node("ImageInvert", image=["1", 1])),
    "a number as true": graph(scale(True)),
    "many nodes": graph(*[node("ImageInvert")] * 100),
    "many pictures": graph(node("RepeatImageBatch", amount=4096)),
}


@pytest.mark.runs
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_refused(runner: httpx.Client, name: str) -> None:
    """The answer is 422 with the node and the reason, and no job exists."""
    before = _jobs(runner)
    answer = send(runner, HOSTILE[name])
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["code"]) == (422, "graph_refused"), answer.text
    assert body["details"]["problem"] in body["detail"]
    assert _jobs(runner) == before


def _jobs(http: httpx.Client) -> list[str]:
    """Return the ids of the owner's newest jobs in any state."""
    return [job["id"] for job in http.get(API).json()["restorations"]]


@pytest.mark.runs
def test_it_takes_the_scope(stack: Stack) -> None:
    """Without the scope neither a user nor an admin may run graphs; the answer names it."""
    for scopes in (USER_SCOPES, (Scope.ADMIN,)):
        with stack.http("user", scopes) as http:
            answer = send(http, graph())
        assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope")
        assert 'scope="workflows:run"' in answer.headers["www-authenticate"]


@pytest.mark.runs
def test_a_run_is_its_owners(stack: Stack, runner: httpx.Client) -> None:
    """Another owner gets the 404 of a missing job."""
    job = send(runner, graph()).json()
    with stack.http("stranger", (*USER_SCOPES, Scope.RUN)) as stranger:
        assert stranger.get(job["links"]["self"]).status_code == 404
        assert stranger.post(job["links"]["cancel"]).status_code == 404
    runner.post(job["links"]["cancel"])
