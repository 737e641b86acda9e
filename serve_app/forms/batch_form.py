"""Read the multipart form of a batch as a stream, one photo after another.

The parts may come in any order. Fields sent before the photos let an invalid batch be refused
before its photos are sent.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import Request
from pydantic import Field

from actors.submission.batches import Photo
from restoration.batches import MAX_BATCH_ITEMS
from restoration.images import ACCEPTED_TYPES
from restoration.jobs import Priority
from restoration.reuse import Reuse
from serve_app.asgi.openapi import multipart_form
from serve_app.forms.form import (
    FORM_OVERHEAD_BYTES,
    JobForm,
    PriorityField,
    ReuseField,
    WorkflowForm,
    validated,
)
from serve_app.forms.multipart import PHOTO, FormParts, Part, malformed

# For each photo's boundary and headers, on top of the photos themselves.
BATCH_OVERHEAD_BYTES = FORM_OVERHEAD_BYTES + MAX_BATCH_ITEMS * 1024


class BatchForm(WorkflowForm):
    """All fields of the form except the photos. They apply to each photo."""

    priority: PriorityField = Field(
        Priority.BATCH,
        description="Interactive jobs run before batch jobs. A batch job that has waited for a "
        "long time takes turns with interactive jobs.",
    )
    reuse: ReuseField = Field(Reuse.ALLOW, description=JobForm.model_fields["reuse"].description)


BATCH_BODY = multipart_form(
    {PHOTO: f"{ACCEPTED_TYPES}. Send the photos after all other fields."},
    BatchForm.model_json_schema(ref_template="#/components/schemas/{model}"),
    max_files=MAX_BATCH_ITEMS,
)


class BatchFormReader:
    """Reads one request's form: the fields before the photos, the photos, and the remaining fields.

    Each method may raise RequestValidationError for a malformed form, HTTPException 400 for an
    invalid multipart body, and the errors of the body's limits.
    """

    def __init__(self, request: Request, max_image_bytes: int) -> None:
        """Raise HTTPException if the content type is not multipart/form-data."""
        self._parts = FormParts(request, {PHOTO, *BatchForm.model_fields}, max_image_bytes)
        self._texts: dict[str, str] = {}
        self._photo: Part | None = None

    async def fields(self) -> BatchForm:
        """Read up to the first photo and return the fields so far. More may follow the photos."""
        self._photo = await self._next_photo()
        return self.all_fields()

    @property
    def names_workflow(self) -> bool:
        """Return whether the workflow is among the fields, so that others can be checked."""
        return "workflow" in self._texts

    async def photos(self) -> AsyncGenerator[Photo, None]:
        while self._photo is not None:
            part, self._photo = self._photo, None
            yield Photo(part.filename or "", part.data(), part.hash.hexdigest())
            del part  # frees its memory before the next one is read
            self._photo = await self._next_photo()

    def all_fields(self) -> BatchForm:
        """Return the fields read so far; after the last photo these are all fields."""
        return validated(BatchForm, self._texts)

    async def _next_photo(self) -> Part | None:
        while (part := await self._parts.next()) is not None:
            if part.name != PHOTO:
                self._texts[part.name] = part.text()
            elif not part.is_file:
                raise malformed(PHOTO, "send each photo as a file in this field")
            elif not part.is_blank:
                return part
        return None
