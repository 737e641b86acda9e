"""Read the multipart form of a submission, once its sender is authenticated.

FastAPI would read the whole body before any dependency runs: up to 50 MB from an unknown client. So
the route reads the form itself, with tight limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, TypeVar
from uuid import UUID

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    ValidationError,
    WithJsonSchema,
)
from pydantic.json_schema import SkipJsonSchema

from actors.submission.requests import SubmissionRequest
from restoration.images import ACCEPTED_TYPES
from restoration.jobs import JobOptions, OutputFormat, Priority
from restoration.reuse import Reuse
from serve_app.asgi.openapi import multipart_form
from serve_app.auth.tokens import Principal
from serve_app.forms.multipart import MAX_FIELD_BYTES, PHOTO, FormParts, Part, malformed
from serve_app.forms.upload_bytes import UploadShare
from serve_app.routes.dependencies import services_of

_Form = TypeVar("_Form", bound=BaseModel)

DEFAULT_WORKFLOW = "restore"
# For part headers, boundaries and the other fields, on top of the image itself.
FORM_OVERHEAD_BYTES = 8 * MAX_FIELD_BYTES

# An empty value of these fields is an error; in others it stands for an input left blank.
_NEVER_EMPTY = frozenset({"workflow", "graph"})


_AnyCase = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
FormatField = Annotated[
    OutputFormat, BeforeValidator(lambda value: "jpeg" if value == "jpg" else value), _AnyCase
]
PriorityField = Annotated[Priority, _AnyCase]
# Written inline, because no response uses the type and so the schema's components lack it.
ReuseField = Annotated[
    Reuse, WithJsonSchema({"type": "string", "enum": [each.value for each in Reuse]}), _AnyCase
]
UploadIdField = Annotated[
    UUID | SkipJsonSchema[None],
    Field(description="Id of a photo that was sent with POST /api/v1/uploads. Replaces `image`."),
]


class JobForm(BaseModel):
    """Options of any job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output_format: FormatField | SkipJsonSchema[None] = Field(
        None, description="Format of the result. Default: the workflow's default format."
    )
    priority: PriorityField = Field(
        Priority.INTERACTIVE,
        description="Interactive jobs run before batch jobs. A batch job that has waited for a "
        "long time takes turns with interactive jobs.",
    )
    queue_limit_s: _Seconds | SkipJsonSchema[None] = Field(
        None,
        description="Maximum seconds from the submission to the start of the job. At most, and by "
        "default, the workflow's limit.",
    )
    run_limit_s: _Seconds | SkipJsonSchema[None] = Field(
        None,
        description="Maximum seconds that an attempt may take. At most, and by default, the "
        "workflow's limit.",
    )
    webhook_url: str | SkipJsonSchema[None] = Field(
        None,
        description="URL that receives a POST request when the job has ended, at least once. It "
        "must use https and a public host.",
    )
    keep_metadata: bool = Field(
        False, description="Copy the photo's EXIF (times, place, camera, author) to the result."
    )
    reuse: ReuseField = Field(
        Reuse.NEVER,
        description="`allow`: if a job of the same photo with the same options has succeeded, and "
        "its result is still stored, the new job succeeds at once with a copy of that result.",
    )

    def to_request(
        self, caller: Principal, image: bytes, idempotency_key: str | None
    ) -> SubmissionRequest:
        """Return the submission of `image` with this form's fields, which are named alike."""
        asked = dict(self)
        options = JobOptions(**{each.name: asked.pop(each.name) for each in fields(JobOptions)})
        return SubmissionRequest(
            owner=caller.sub,
            quotas=caller.quotas,
            image=image,
            idempotency_key=idempotency_key,
            options=options,
            **asked,
        )


class WorkflowForm(JobForm):
    """Options of any job that runs a workflow of the catalogue."""

    workflow: str = Field(
        DEFAULT_WORKFLOW, description="Name of a workflow, as GET /api/v1/workflows lists it."
    )
    params: Json[dict[str, Any]] = Field(
        default_factory=dict,
        description="Parameters as a JSON object, which the workflow's JSON Schema describes.",
    )


class RestorationForm(WorkflowForm):
    """All fields of a submission's form except the image."""

    upload_id: UploadIdField = None


class RunForm(JobForm):
    """All fields of a run's form except the image."""

    graph: Json[dict[str, Any]] = Field(
        description="A graph in ComfyUI's API format, as a JSON object. Its only LoadImage node "
        "must have the file name `image`. docs/api.md lists the permitted nodes."
    )
    upload_id: UploadIdField = None


def _body(form: type[BaseModel]) -> dict[str, Any]:
    return multipart_form(
        {"image": f"{ACCEPTED_TYPES}. The type is determined by the content, not by the name."},
        form.model_json_schema(ref_template="#/components/schemas/{model}"),
        instead="upload_id",
    )


FORM_BODY, RUN_BODY = _body(RestorationForm), _body(RunForm)


async def read_submission(
    request: Request,
    form: type[RestorationForm] | type[RunForm],
    caller: Principal,
    share: UploadShare,
    idempotency_key: str | None,
) -> SubmissionRequest:
    """Read and validate the form of a submission. Its caller has to have an upload slot.

    Raises RequestValidationError if it is malformed, ImageTooLarge, TooManyUploads, and
    HTTPException 400 or 415 if it is not multipart.
    """
    services = services_of(request)
    limits = services.settings.upload_limits
    parts = FormParts(request, {PHOTO, *form.model_fields}, limits.max_bytes)
    texts: dict[str, str] = {}
    photo: Part | None = None
    while (part := await parts.next()) is not None:
        if part.name != PHOTO:
            texts[part.name] = part.text()
        elif not part.is_file:
            raise malformed(PHOTO, "send the photo as a file in this field")
        elif photo is not None:
            raise malformed(
                PHOTO, "send one photo in this field; POST /api/v1/batches takes several"
            )
        elif not part.is_blank:
            photo = part
    asked = validated(form, texts)
    if (photo is None) == (asked.upload_id is None):
        raise malformed(PHOTO, "send either the photo as a file in this field, or upload_id")
    if asked.upload_id is not None:
        share.take(await services.uploads.size_of(caller.sub, asked.upload_id))
    return asked.to_request(caller, photo.data() if photo else b"", idempotency_key)


def validated(kind: type[_Form], texts: Mapping[str, str]) -> _Form:
    """Return the form with these fields. Except for a few fields, an empty text counts as absent.

    Raises RequestValidationError.
    """
    try:
        return kind.model_validate(
            {name: text for name, text in texts.items() if text or name in _NEVER_EMPTY}
        )
    except ValidationError as error:
        raise RequestValidationError(
            [{**item, "loc": ("form", *item["loc"])} for item in error.errors()]
        ) from None
