"""The multipart form of a batch, read as a stream: one photo after another, never all of them.

Its parts may come in any order. Fields in front of the photos let a batch that is wrong as a whole
be refused before its photos have been sent.
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

# Each photo's boundary and headers, on top of the photos themselves.
BATCH_OVERHEAD_BYTES = FORM_OVERHEAD_BYTES + MAX_BATCH_ITEMS * 1024


class BatchForm(WorkflowForm):
    """Every field of the form but the photos; they hold for each of these."""

    priority: PriorityField = Field(
        Priority.BATCH,
        description="interactive goes before batch, until a batch job has waited for long",
    )
    reuse: ReuseField = Field(Reuse.ALLOW, description=JobForm.model_fields["reuse"].description)


BATCH_BODY = multipart_form(
    {PHOTO: f"{ACCEPTED_TYPES}; best after all other fields"},
    BatchForm.model_json_schema(ref_template="#/components/schemas/{model}"),
    max_files=MAX_BATCH_ITEMS,
)


class BatchFormReader:
    """Reads one request's form: the fields in front of the photos, the photos, and the rest.

    All raise RequestValidationError (malformed), 400 for no multipart, and what the body's limit
    raises.
    """

    def __init__(self, request: Request, max_image_bytes: int) -> None:
        """Raises HTTPException for another type of content."""
        self._parts = FormParts(request, {PHOTO, *BatchForm.model_fields}, max_image_bytes)
        self._texts: dict[str, str] = {}
        self._photo: Part | None = None

    async def fields(self) -> BatchForm:
        """The fields in front of the first photo, which others may follow."""
        self._photo = await self._next_photo()
        return self.all_fields()

    @property
    def names_workflow(self) -> bool:
        """Whether a field that has come says which, so that the others mean something."""
        return "workflow" in self._texts

    async def photos(self) -> AsyncGenerator[Photo, None]:
        while self._photo is not None:
            yield self._take(self._photo)
            self._photo = await self._next_photo()

    def _take(self, part: Part) -> Photo:
        """Nothing of it stays here while the next one is read."""
        self._photo = None
        return Photo(part.filename or "", part.data(), part.hash.hexdigest())

    def all_fields(self) -> BatchForm:
        """Those that have come: once there are no more photos, all of them."""
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
