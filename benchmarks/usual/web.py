"""The web server: `uvicorn benchmarks.usual.web:app`. FastAPI runs its plain functions on
threads."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any
from uuid import UUID, uuid4

from fastapi import FastAPI, File, Form, HTTPException
from fastapi.responses import RedirectResponse
from sqlalchemy import text

from actors.images.reader import examine
from benchmarks.usual.stores import (
    BUCKET,
    TASK,
    Ends,
    open_broker,
    open_database,
    open_s3,
)
from restoration.errors import InvalidRequest
from restoration.images import UploadLimits

app = FastAPI()
_database, _s3, _broker, _ends = open_database(), open_s3(), open_broker(), Ends()
_LIMITS = UploadLimits()
_INSERT = text(
    "INSERT INTO usual_jobs (id, status, params, input_key, sha256)"
    " VALUES (:id, 'queued', :params, :key, :sha256)"
)
_SELECT = text("SELECT status, output_key FROM usual_jobs WHERE id = :id")


@app.post("/jobs", status_code=202)
def submit(image: Annotated[bytes, File()], params: Annotated[str, Form()]) -> dict[str, str]:
    try:
        picture = examine(image, _LIMITS)
    except InvalidRequest as error:
        raise HTTPException(422, error.message) from error
    job_id = uuid4()
    key, sha256 = f"usual/inputs/{job_id}", hashlib.sha256(image).hexdigest()
    _s3.put_object(Bucket=BUCKET, Key=key, Body=image, ContentType=picture.type.value)
    row = {"id": job_id, "params": json.dumps(json.loads(params)), "key": key, "sha256": sha256}
    with _database.begin() as connection:
        connection.execute(_INSERT, row)
    _broker.send_task(TASK, [str(job_id)])
    return {"id": str(job_id), "status": "queued"}


@app.get("/jobs/{job_id}")
def show(job_id: UUID, wait_s: float = 0) -> dict[str, str]:
    if wait_s and _job(job_id).status in {"queued", "running"}:
        _ends.wait(str(job_id), wait_s)
    return {"id": str(job_id), "status": _job(job_id).status}


@app.get("/jobs/{job_id}/result")
def result(job_id: UUID) -> RedirectResponse:
    job = _job(job_id)
    if job.output_key is None:
        raise HTTPException(409, f"the job is {job.status}")
    where = {"Bucket": BUCKET, "Key": job.output_key}
    return RedirectResponse(_s3.generate_presigned_url("get_object", Params=where))


def _job(job_id: UUID) -> Any:
    with _database.connect() as connection:
        row = connection.execute(_SELECT, {"id": job_id}).first()
    if row is None:
        raise HTTPException(404, "there is no such job")
    return row
