"""A worker that runs one job at a time: `celery --app benchmarks.usual.worker worker`.

COMFYUI_URL names its engine. Its connections live as long as the process.
"""

from __future__ import annotations

import json
import os
import uuid
from functools import cache
from typing import Any

import httpx
import websocket
from sqlalchemy import text

from benchmarks.figures import HERE
from benchmarks.usual.stores import BUCKET, TASK, Ends, open_broker, open_database, open_s3
from workflows.catalog import Workflow, load_catalog
from workflows.render import render

WORKFLOW = "held"
_CLIENT = uuid.uuid4().hex
_BEGIN = text("UPDATE usual_jobs SET status = 'running' WHERE id = :id RETURNING params, input_key")
_END = text(
    "UPDATE usual_jobs SET status = 'succeeded', output_key = :key, finished_at = now()"
    " WHERE id = :id"
)
_FAIL = text("UPDATE usual_jobs SET status = 'failed', finished_at = now() WHERE id = :id")

app = open_broker()
_database, _s3, _ends = open_database(), open_s3(), Ends()
_http = httpx.Client(base_url=os.environ["COMFYUI_URL"], timeout=60, trust_env=False)


@cache
def _socket() -> websocket.WebSocket:
    address = os.environ["COMFYUI_URL"].replace("http", "ws", 1)
    return websocket.create_connection(f"{address}/ws?clientId={_CLIENT}", timeout=60)


@cache
def _workflow() -> Workflow:
    return load_catalog(more=HERE / "workflows").find(WORKFLOW)


def restore(job_id: str) -> None:
    with _database.begin() as connection:
        job = connection.execute(_BEGIN, {"id": job_id}).one()
    photo = _s3.get_object(Bucket=BUCKET, Key=job.input_key)["Body"].read()
    outcome = _FAIL
    key = f"usual/outputs/{job_id}.png"
    if (picture := _run(job_id, photo, job.params)) is not None:
        _s3.put_object(Bucket=BUCKET, Key=key, Body=picture, ContentType="image/png")
        outcome = _END
    with _database.begin() as connection:
        connection.execute(outcome, {"id": job_id} | ({"key": key} if outcome is _END else {}))
    _ends.tell(job_id)


def _run(job_id: str, photo: bytes, params: dict[str, Any]) -> bytes | None:
    """Return the PNG that ComfyUI's SaveImage wrote, or None if there is none."""
    socket, workflow = _socket(), _workflow()  # connect before an event could be missed
    sent = _http.post("/upload/image", files={"image": (job_id, photo)}).raise_for_status().json()
    prompt = render(workflow, workflow.resolve(params), sent["name"], job_id)
    body = {"prompt": prompt, "prompt_id": job_id, "client_id": _CLIENT}
    _http.post("/prompt", json=body).raise_for_status()
    while not _is_end(socket.recv(), job_id):
        pass
    history = _http.get(f"/history/{job_id}").raise_for_status().json()[job_id]
    node = workflow.manifest.output.node
    if not (saved := history["outputs"].get(node, {}).get("images")):
        return None
    return _http.get("/view", params=saved[0]).raise_for_status().content


def _is_end(message: str | bytes, prompt_id: str) -> bool:
    if isinstance(message, bytes):
        return False
    event = json.loads(message)
    data = event.get("data", {})
    over = event["type"] == "executing" and data.get("node") is None
    return bool(over and data.get("prompt_id") == prompt_id)


app.task(name=TASK)(restore)
