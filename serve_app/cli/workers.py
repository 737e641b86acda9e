"""The operators' commands of `restore`: the fleet's status, and orders to single workers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Annotated

import typer
from rich.live import Live

from restoration.errors import InvalidRequest
from serve_app.auth.scopes import Scope
from serve_app.cli.shared import ServerOption, TokenOption, err, open_client, out
from serve_app.cli.worker_tables import status_view
from serve_app.client import RestorationClient
from serve_app.schemas.workers import QueueView, WorkerList, WorkerView

REFRESH_S = 1.0
WorkerArgument = Annotated[
    str,
    typer.Argument(
        metavar="WORKER",
        help="Id of the worker, or its first characters. `restore status` lists the ids.",
    ),
]


def register(app: typer.Typer) -> None:
    app.command()(status)
    app.command()(drain)
    app.command()(undrain)
    app.command("restart-engine")(restart_engine)


def status(
    once: Annotated[bool, typer.Option("--once", help="Print the status once and exit.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the status once, as JSON.")
    ] = False,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Show the workers, their jobs and the queue. The display updates until Ctrl-C."""
    with _operator(server, token) as client:
        if as_json:
            workers, queue = (view.model_dump(mode="json") for view in _look(client))
            out.print_json(json.dumps({"workers": workers, "queue": queue}))
        elif once or not out.is_terminal:
            out.print(status_view(*_look(client)))
        else:
            with Live(status_view(*_look(client)), console=out, screen=True) as live:
                while True:
                    time.sleep(REFRESH_S)  # ends with Ctrl-C, or if the service cannot be reached
                    live.update(status_view(*_look(client)))


def drain(worker: WorkerArgument, server: ServerOption = None, token: TokenOption = None) -> None:
    """Let a worker finish its jobs and claim no more until `restore undrain`."""
    _order(worker, RestorationClient.drain, "claims no more jobs", server, token)


def undrain(worker: WorkerArgument, server: ServerOption = None, token: TokenOption = None) -> None:
    """Let a drained worker claim jobs again."""
    _order(worker, RestorationClient.undrain, "claims jobs again", server, token)


def restart_engine(
    worker: WorkerArgument, server: ServerOption = None, token: TokenOption = None
) -> None:
    """Restart a worker's engine as soon as no job runs in it."""
    done = "restarts its engine when no job is in it"
    _order(worker, RestorationClient.restart_engine, done, server, token)


def _operator(server: str | None, token: str | None) -> RestorationClient:
    return open_client(server, token, [Scope.ADMIN])


def _look(client: RestorationClient) -> tuple[WorkerList, QueueView]:
    return client.workers(), client.queue()


def _order(
    beginning: str,
    order: Callable[[RestorationClient, str], WorkerView],
    done: str,
    server: str | None,
    token: str | None,
) -> None:
    with _operator(server, token) as client:
        worker = the_one([each.id for each in client.workers().workers], beginning)
        order(client, worker)
    err.print(f"worker {worker} {done}")


def the_one(ids: list[str], beginning: str) -> str:
    """Return the only id that starts with `beginning`.

    Raises InvalidRequest, which lists the candidates, for none or several.
    """
    found = [each for each in ids if each.startswith(beginning)]
    if len(found) == 1:
        return found[0]
    trouble = "several worker ids start" if found else "no worker id starts"
    known = ", ".join(found or ids) or "there are no workers"
    raise InvalidRequest(f"{trouble} with {beginning!r}: {known}")
