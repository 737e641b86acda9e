"""OpenAPI parts that FastAPI does not generate: problems as error bodies, and multipart forms.

Routes declare their errors with `problems(JobNotFound, ...)`; statuses and codes come from the
table that the error handlers use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from restoration.errors import RestorationError
from restoration.jobs import OutputFormat
from serve_app.asgi.errors import PROBLEM_JSON, STATUS_OF
from serve_app.schemas.restorations import Problem

_BINARY = "application/octet-stream"
_REF_TEMPLATE = "#/components/schemas/{model}"
_PROBLEM = {PROBLEM_JSON: {"schema": {"$ref": _REF_TEMPLATE.format(model=Problem.__name__)}}}


def _file(media_type: str) -> dict[str, Any]:
    """Return the schema of a file.

    `format` is of OpenAPI 3.0, and generators still recognise files by it.
    """
    return {"type": "string", "format": "binary", "contentMediaType": media_type}


PICTURES: dict[str, dict[str, Any]] = {
    kind.content_type: {"schema": _file(kind.content_type)} for kind in OutputFormat
}

Responses = dict[int | str, dict[str, Any]]


def problems(*errors: type[RestorationError], **codes: int) -> Responses:
    """Return OpenAPI responses for `errors`, and for further `codes` with their statuses."""
    status_of = {error.code: int(STATUS_OF[error]) for error in errors} | codes
    by_status: dict[int, list[str]] = {}
    for code, status in status_of.items():
        by_status.setdefault(status, []).append(f"`{code}`")
    return {
        status: {"description": " or ".join(names), "content": _PROBLEM}
        for status, names in by_status.items()
    }


def header(description: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}}


def multipart_form(
    files: Mapping[str, str],
    fields: dict[str, Any],
    max_files: int | None = None,
    instead: str | None = None,
) -> dict[str, Any]:
    """Return a request body of required files (name to description) and a JSON Schema's fields.

    With `max_files`, each name takes one to that many files. The field `instead` may be sent in
    place of the files.
    """
    parts: dict[str, dict[str, Any]] = {
        name: {**_file(_BINARY), "description": text} for name, text in files.items()
    }
    if max_files is not None:
        parts = {
            name: {"type": "array", "minItems": 1, "maxItems": max_files, "items": part}
            for name, part in parts.items()
        }
    needed = [*fields.get("required", ())]
    schema: dict[str, Any] = {
        "type": "object",
        "required": [*(files if instead is None else ()), *needed],
        # generated clients send the parts in this order; the large ones should come last
        "properties": {**fields["properties"], **parts},
        "additionalProperties": False,
    }
    if instead is not None:
        # generators turn `oneOf` into a union of two types without the fields
        schema["if"] = {"required": [instead]}
        schema["then"] = {"not": {"anyOf": [{"required": [name]} for name in files]}}
        schema["else"] = {"required": list(files)}
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def install_openapi(app: FastAPI) -> None:
    """Add the missing parts to `app.openapi()`. The document is built once, on first use."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                routes=app.routes,
            )
            schema = Problem.model_json_schema(ref_template=_REF_TEMPLATE)
            app.openapi_schema["components"]["schemas"][Problem.__name__] = schema
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign] # FastAPI's documented way to extend it
