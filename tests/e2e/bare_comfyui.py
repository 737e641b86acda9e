"""The reference result: a prompt run by ComfyUI through plain HTTP calls, without our code.

Follows https://docs.comfy.org/development/comfyui-server/comms_routes
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from uuid import uuid4

import httpx

from workflows.catalog import load_catalog
from workflows.render import render

DEADLINE_S = 600.0


def run_bare(
    comfyui_url: str, workflow_name: str, params: Mapping[str, object], image: bytes
) -> bytes:
    """Return the PNG that the workflow's graph saves."""
    workflow = load_catalog().find(workflow_name)
    run = uuid4().hex
    with httpx.Client(base_url=comfyui_url, trust_env=False, timeout=300) as comfyui:
        upload = comfyui.post("/upload/image", files={"image": (f"{run}.png", image)}).json()
        graph = render(workflow, workflow.resolve(params), upload["name"], run)
        prompt = {"prompt": graph, "client_id": run}
        prompt_id = comfyui.post("/prompt", json=prompt).raise_for_status().json()["prompt_id"]
        outputs = _outputs(comfyui, prompt_id)
        saved = outputs[workflow.manifest.output.node]["images"][0]
        return comfyui.get("/view", params=saved).raise_for_status().content


def _outputs(comfyui: httpx.Client, prompt_id: str) -> dict[str, dict[str, list[dict[str, str]]]]:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if (entry := comfyui.get(f"/history/{prompt_id}").json().get(prompt_id)) is not None:
            outputs: dict[str, dict[str, list[dict[str, str]]]] = entry["outputs"]
            return outputs
        time.sleep(0.1)
    raise TimeoutError(f"ComfyUI did not finish {prompt_id}")
