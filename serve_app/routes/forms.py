"""The multipart form of a submission, read only once its sender is known.

FastAPI would read the whole body before any dependency runs; 50 MB from anybody is too much to
take in before asking who it is. So the route reads the form itself, with tight limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from actors.submission import SubmissionRequest
from restoration.jobs import OutputFormat, Priority
from serve_app.auth import Principal
from serve_app.openapi import multipart_form
from serve_app.routes.dependencies import authenticated
from serve_app.routes.uploads import UploadSlot, upload_slot

_Form = TypeVar("_Form", bound=BaseModel)

DEFAULT_WORKFLOW = "restore"
MAX_FIELD_BYTES = 64 * 1024
# Part headers, boundaries and the other fields, on top of the image itself.
FORM_OVERHEAD_BYTES = 8 * MAX_FIELD_BYTES
MAX_FIELDS = 7


class RestorationForm(BaseModel):
    """Every field of the form but the image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workflow: str = Field(DEFAULT_WORKFLOW, description="see GET /api/v1/workflows")
    params: Json[dict[str, Any]] = Field(
        default_factory=dict, description="a JSON object; the workflow's schema says what goes in"
    )
    output_format: OutputFormat = OutputFormat.PNG
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
        None, description="where to POST, once, that the job has ended; https, and a public host"
    )

    def asks(
        self, caller: Principal, image: bytes, idempotency_key: str | None
    ) -> SubmissionRequest:
        return SubmissionRequest(
            owner=caller.sub,
            quotas=caller.quotas,
            image=image,
            workflow=self.workflow,
            params=self.params,
            output_format=self.output_format,
            priority=self.priority,
            idempotency_key=idempotency_key,
            queue_limit_s=self.queue_limit_s,
            run_limit_s=self.run_limit_s,
            webhook_url=self.webhook_url,
        )


@dataclass(frozen=True, slots=True)
class SubmittedForm:
    image: bytes
    fields: RestorationForm


FORM_BODY = multipart_form(
    {"image": "JPEG, PNG, WebP, TIFF or BMP; judged by its content, not by its name"},
    RestorationForm.model_json_schema(ref_template="#/components/schemas/{model}"),
)


async def submitted_form(
    request: Request,
    _caller: Annotated[object, Depends(authenticated)],
    _slot: Annotated[UploadSlot, Depends(upload_slot)],
) -> SubmittedForm:
    """Raises RequestValidationError (malformed), ImageTooLarge, and 400 or 415 for no multipart."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, "send multipart/form-data with the photo in the field 'image'")
    async with request.form(
        max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
    ) as form:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise malformed("image", "send the photo as a file in this field")
        fields = _text_fields(form)
        data = await image.read()
    return SubmittedForm(data, validated(RestorationForm, fields))


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
