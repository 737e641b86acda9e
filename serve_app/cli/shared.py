"""Shared parts of the `restore` commands: consoles, common options, and opening a client."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from persistence.embedded.state import holder_of
from restoration.errors import SetupError
from restoration.reuse import Reuse
from restoration.settings import load_node_settings
from serve_app.auth.local_issuer import LOCAL_AUDIENCE, mint_token
from serve_app.auth.scopes import USER_SCOPES
from serve_app.client import RestorationClient
from serve_app.local.record import StackRecord, find_stack, issuer_folder

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

# Enough for a service that restarts; after that a waiting user should see the error.
RETRY_FOR_S = 10.0

ServerOption = Annotated[
    str | None,
    typer.Option(envvar="RESTORE_SERVER", help="URL of the service. Default: the local stack."),
]
TokenOption = Annotated[
    str | None,
    typer.Option(envvar="RESTORE_TOKEN", help="Bearer token. Default: a token of the local stack."),
]
WorkflowOption = Annotated[
    str, typer.Option(help="Workflow to run; GET /api/v1/workflows lists them.")
]
ParamOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Parameter of the workflow. May be repeated."),
]

ReuseOption = Annotated[
    bool,
    typer.Option("--reuse/--no-reuse", help="Use the stored result of an earlier, identical job."),
]


def complain(message: str) -> None:
    err.print(f"[red]error:[/] {escape(message)}", soft_wrap=True)


def state_dir() -> Path:
    return load_node_settings(os.environ).state_dir


def open_client(
    server: str | None, token: str | None, more_scopes: Iterable[str] = ()
) -> RestorationClient:
    """Return a client for `server`, by default the local stack.

    Without `token` it uses one of the local stack's issuer, with `more_scopes`. Raises SetupError
    if a local stack is needed and none is running.
    """
    if server and token:
        return RestorationClient(server, token, retry_for_s=RETRY_FOR_S)
    stack = local_stack()
    url, token = server or stack.url, token or local_token(stack, "local", more_scopes)
    return RestorationClient(url, token, retry_for_s=RETRY_FOR_S)


def local_stack() -> StackRecord:
    stack = find_stack(state_dir())
    if stack is None:
        if (pid := holder_of(state_dir())) is not None:
            raise SetupError(
                f"the local stack (pid {pid}) is starting or stopping; try again in a minute"
            )
        raise SetupError(
            "no local stack is running; run `restore up`, or give --server and --token"
        )
    if stack.lost:
        raise SetupError(
            f"the local stack lost its Ray ({stack.lost}) and is restarting it; try again in a "
            "minute"
        )
    return stack


def local_token(
    stack: StackRecord, sub: str, more_scopes: Iterable[str] = (), lifetime_s: int = 3600
) -> str:
    """Return a token of the local issuer for `sub`, with a user's scopes and `more_scopes`.

    Raises SetupError if the stack has no issuer of its own.
    """
    if stack.issuer is None:
        raise SetupError(
            "the local stack issues no tokens since AUTH0_DOMAIN is set; get one from Auth0"
        )
    keys = issuer_folder(state_dir())
    return mint_token(
        keys, stack.issuer, LOCAL_AUDIENCE, sub, [*USER_SCOPES, *more_scopes], lifetime_s
    )


def may_reuse(flag: bool) -> Reuse:
    return Reuse.ALLOW if flag else Reuse.NEVER


def parse_parameter(text: str) -> tuple[str, object]:
    """Parse NAME=VALUE: `scale=2` gives ("scale", 2).

    The value is read as JSON if it is valid JSON, and as text otherwise. Raises BadParameter.
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r} must have the form NAME=VALUE", param_hint="--param")
    with suppress(ValueError):
        return name, json.loads(value)
    return name, value
