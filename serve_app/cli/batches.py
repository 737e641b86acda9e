"""`restore batch`: submit and follow many photos as one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count, islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Annotated
from uuid import UUID

import typer
from rich.markup import escape

from restoration.batches import MAX_BATCH_ITEMS, item_name
from restoration.jobs import JobStatus, OutputFormat
from serve_app.cli.display import batches_table, counts_text, follow_batch
from serve_app.cli.photo_files import find_photos
from serve_app.cli.shared import (
    ParamOption,
    ReuseOption,
    ServerOption,
    TokenOption,
    WorkflowOption,
    complain,
    err,
    may_reuse,
    open_client,
    out,
    parse_parameter,
)
from serve_app.client import ApiError, RestorationClient
from serve_app.schemas.batches import BatchItemView

batch_app = typer.Typer(help="Submit and follow many photos as one batch.", no_args_is_help=True)

FolderOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", file_okay=False, help="Folder to download the results to."),
]


@batch_app.command()
def submit(
    photos: Annotated[
        list[Path],
        typer.Argument(exists=True, help="Photo files, and folders with photos."),
    ],
    output: FolderOption = None,
    recursive: Annotated[
        bool,
        typer.Option(
            "--recursive",
            "-r",
            help="Include the photos in subfolders. Their results go to subfolders of the same "
            "names.",
        ),
    ] = False,
    workflow: WorkflowOption = "restore",
    param: ParamOption = None,
    output_format: Annotated[
        OutputFormat | None,
        typer.Option("--format", help="Format of the results. Default: the workflow's."),
    ] = None,
    reuse: ReuseOption = True,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Submit photos as one batch, wait until it has ended, and download the results."""
    found = find_photos(photos, recursive=recursive, output=output)
    for line in found.left_out_lines():
        err.print(escape(line), soft_wrap=True)
    files = found.photos
    if not 0 < len(files) <= MAX_BATCH_ITEMS:
        raise typer.BadParameter(
            f"found {len(files)} photos; a batch has 1 to {MAX_BATCH_ITEMS}", param_hint="PHOTOS"
        )
    params = dict(parse_parameter(text) for text in param or [])
    with open_client(server, token) as client:
        with err.status(f"sending {len(files)} photos"):
            batch = client.submit_batch(
                [file.path for file in files],
                names=[file.place.as_posix() for file in files],
                workflow=workflow,
                params=params,
                output_format=output_format,
                reuse=may_reuse(reuse),
            )
        _finish(client, batch.id, output, dict(enumerate(file.place for file in files)))


@batch_app.command()
def wait(
    batch_id: UUID,
    output: FolderOption = None,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Wait until a batch has ended, and download the results."""
    with open_client(server, token) as client:
        _finish(client, batch_id, output, {})


@batch_app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=100, help="Maximum number of batches.")] = 20,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """List batches, newest first."""
    with open_client(server, token) as client:
        out.print(batches_table(islice(client.batches(limit=limit), limit)))


@batch_app.command()
def show(batch_id: UUID, server: ServerOption = None, token: TokenOption = None) -> None:
    """Show a batch and all of its photos as JSON."""
    with open_client(server, token) as client:
        shown = client.batch(batch_id).model_dump(mode="json", by_alias=True)
        items = [item.model_dump(mode="json") for item in client.batch_items(batch_id)]
    out.print_json(data={**shown, "items": items})


@batch_app.command()
def cancel(batch_id: UUID, server: ServerOption = None, token: TokenOption = None) -> None:
    """Cancel the unfinished jobs of a batch, and wait until all have ended."""
    with open_client(server, token) as client:
        client.cancel_batch(batch_id)
        ended = follow_batch(err, client, batch_id)
    err.print(f"batch {ended.id} {ended.status}: {counts_text(ended)}")


def _finish(
    client: RestorationClient,
    batch_id: UUID,
    output: Path | None,
    places: Mapping[int, PurePath],
) -> None:
    """Wait for the batch and download its results to `output`, if given.

    Exits with status 1 unless every photo was restored and downloaded. `places` maps a photo's
    index to its path, where the command knows it.
    """
    try:
        ended = follow_batch(err, client, batch_id)
    except KeyboardInterrupt:
        err.print(
            f"the batch continues: restore batch wait {batch_id}, or restore batch cancel "
            f"{batch_id}"
        )
        raise
    items = list(client.batch_items(batch_id))
    problems = []
    for item in items:
        if item.status is not JobStatus.SUCCEEDED:
            reason = f": {item.failure.message} [{item.failure.code}]" if item.failure else ""
            problems.append(f"{item_name(item.name)}: {item.status}{reason}")
    if output is not None:
        with err.status(f"downloading to {output}"):
            problems += _download(client, items, output, places)
    for problem in problems:
        complain(problem)
    err.print(f"batch {ended.id} {ended.status}: {counts_text(ended)}")
    if problems:
        raise typer.Exit(1)


def _download(
    client: RestorationClient,
    items: Sequence[BatchItemView],
    folder: Path,
    places: Mapping[int, PurePath],
) -> Iterator[str]:
    """Write every result below `folder`, at its photo's path; yield a line for each failure."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        if item.job_id is None or item.status is not JobStatus.SUCCEEDED:
            continue
        # the path under which the photo was sent, made safe: it must not lead out of the folder
        parts = [part for part in PurePosixPath(item.name).parts if part not in {"/", "//", ".."}]
        place = places.get(item.index, PurePath(*parts or ["photo"]))
        try:
            suffix = client.get(item.job_id).output_format.suffix
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            client.download(item.job_id, _unused_path(folder / place, item.index, suffix))
        except (ApiError, OSError) as error:
            yield f"{item_name(item.name)}: {error}"


def _unused_path(place: Path, index: int, suffix: str) -> Path:
    """Return the first of NAME, NAME-INDEX, NAME-INDEX-1, ... that does not exist.

    So a result never overwrites its own photo, or the result of a photo from another folder or of
    another type.
    """
    stem = place.stem or "photo"
    numbered = f"{stem}-{index}"
    stems = chain([stem, numbered], (f"{numbered}-{number}" for number in count(1)))
    paths = (place.with_name(f"{each}{suffix}") for each in stems)
    return next(path for path in paths if not path.exists())
