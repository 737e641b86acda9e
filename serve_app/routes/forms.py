"""The multipart form of a submission, read only once its sender is known.

FastAPI would read the whole body before any dependency runs; 50 MB from anybody is too much to
take in before asking who it is. So the route reads the form itself, with tight limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from uuid import UUID

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from actors.submission import SubmissionRequest
from restoration.jobs import OutputFormat, Priority
from restoration.reuse import Reuse
from serve_app.auth import Principal
from serve_app.openapi import multipart_form
from serve_app.routes.dependencies import authenticated
from serve_app.routes.uploads import UploadSlot, upload_slot

_Form = TypeVar("_Form", bound=BaseModel)

DEFAULT_WORKFLOW = "restore"
MAX_FIELD_BYTES = 64 * 1024
# Part headers, boundaries and the other fields, on top of the image itself.
FORM_OVERHEAD_BYTES = 8 * MAX_FIELD_BYTES
MAX_FIELDS = 10

# Written out, because no answer has one: it is among no components.
ReuseField = Annotated[
    Reuse, WithJsonSchema({"type": "string", "enum": [each.value for each in Reuse]})
]


class JobForm(BaseModel):
    """What may be asked for any picture, whatever is made of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output_format: OutputFormat | SkipJsonSchema[None] = Field(
        None, description="by default the workflow's"
    )
    priority: Priority = Field(
        Priority.INTERACTIVE,
        description="interactive goes before batch, until a batch job has waited for long",
    )
    queue_limit_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="seconds to the start at the latest; at most, and by default, the workflow's",
    )
    run_limit_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="seconds for an attempt; at most, and by default, the workflow's",
    )
    webhook_url: str | SkipJsonSchema[None] = Field(
        None,
        description="where to POST that the job has ended, at least once; https, and a public host",
    )
    keep_metadata: bool = Field(
        False, description="gives the result the photo's EXIF: times, place, camera, author"
    )

    reuse: ReuseField = Field(
        Reuse.NEVER,
        description="allow: if the same was done for the same photo before, and its result is "
        "still there, the job has succeeded at once, with a copy of that",
    )

    def asks(
        self, caller: Principal, image: bytes, idempotency_key: str | None
    ) -> SubmissionRequest:
        """The fields that a form has are those of the request."""
        asked = {name: getattr(self, name) for name in type(self).model_fields}
        return SubmissionRequest(
            owner=caller.sub,
            quotas=caller.quotas,
            image=image,
            idempotency_key=idempotency_key,
            **asked,
        )


class WorkflowForm(JobForm):
    """What may be asked for any photo, however it comes."""

    workflow: str = Field(DEFAULT_WORKFLOW, description="see GET /api/v1/workflows")
    params: Json[dict[str, Any]] = Field(
        default_factory=dict, description="a JSON object; the workflow's schema says what goes in"
    )


_UPLOAD_ID = Field(
    None, description="in place of `image`: a photo that was sent to POST /api/v1/uploads"
)


class RestorationForm(WorkflowForm):
    """Every field of the form but the image."""

    upload_id: UUID | SkipJsonSchema[None] = _UPLOAD_ID


class RunForm(JobForm):
    """Every field of the form of a run but the image."""

    graph: Json[dict[str, Any]] = Field(
        description="a JSON object: a graph in ComfyUI's API format, whose one LoadImage names "
        "`image` as its file; docs/api.md says what it may contain"
    )
    upload_id: UUID | SkipJsonSchema[None] = _UPLOAD_ID


@dataclass(frozen=True, slots=True)
class SubmittedForm:
    """`image` is empty for a photo that was uploaded before."""

    image: bytes
    fields: RestorationForm | RunForm


def _body(form: type[BaseModel]) -> dict[str, Any]:
    return multipart_form(
        {"image": "JPEG, PNG, WebP, TIFF or BMP; judged by its content, not by its name"},
        form.model_json_schema(ref_template="#/components/schemas/{model}"),
        instead="upload_id",
    )


FORM_BODY, RUN_BODY = _body(RestorationForm), _body(RunForm)

_Authenticated = Annotated[object, Depends(authenticated)]
_WithSlot = Annotated[UploadSlot, Depends(upload_slot)]


async def submitted_form(
    request: Request, _caller: _Authenticated, _slot: _WithSlot
) -> SubmittedForm:
    """Raises RequestValidationError (malformed), ImageTooLarge, and 400 or 415 for no multipart."""
    return await _read(request, RestorationForm)


async def submitted_run(
    request: Request, _caller: _Authenticated, _slot: _WithSlot
) -> SubmittedForm:
    """As `submitted_form`."""
    return await _read(request, RunForm)


async def _read(request: Request, kind: type[RestorationForm] | type[RunForm]) -> SubmittedForm:
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, "send multipart/form-data with the photo in the field 'image'")
    _, options = parse_options_header(request.headers["content-type"])
    # Starlette would take any codec of Python's, slow and broken ones too.
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise HTTPException(415, "send the form's fields in UTF-8")
    async with request.form(
        max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
    ) as form:
        image = form.get("image")
        fields = validated(kind, _text_fields(form))
        if isinstance(image, UploadFile) == (fields.upload_id is not None):
            raise malformed("image", "send the photo as a file in this field, or its upload_id")
        data = await image.read() if isinstance(image, UploadFile) else b""
    return SubmittedForm(data, fields)


def validated(kind: type[_Form], fields: Mapping[str, str]) -> _Form:
    """Raises RequestValidationError."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(
            [{**item, "loc": ("form", *item["loc"])} for item in error.errors()]
        ) from None


def _text_fields(form: FormData) -> dict[str, str]:
    items = [(name, value) for name, value in form.multi_items() if name != "image"]
    fields = {name: value for name, value in items if isinstance(value, str)}
    if len(fields) < len(items):
        raise malformed("form", "each field must be sent once, and none but 'image' as a file")
    return fields


def malformed(field: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("form", field), "msg": message, "type": "form"}])
