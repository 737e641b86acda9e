"""`restore usage`: GPU seconds used by jobs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from serve_app.cli.shared import ServerOption, TokenOption, open_client, out
from serve_app.schemas.restorations import UsageView

_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def usage(
    since: Annotated[
        str,
        typer.Option(
            help="A date (2026-11-01), or a time ago in hours, days or weeks (12h, 7d, 4w)."
        ),
    ] = "30d",
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Show GPU seconds by owner and workflow: your own, or all owners' with an admin's token."""
    moment = parse_since(since, datetime.now().astimezone())
    with open_client(server, token) as client:
        report = client.usage(moment)
    out.print(usage_table(report.usage))


def parse_since(text: str, now: datetime) -> datetime:
    """Return a moment in the time zone of `now`. Raises BadParameter."""
    if match := re.fullmatch(r"(\d{1,4})([hdw])", text):
        return now - timedelta(**{_UNITS[match[2]]: int(match[1])})
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        reason = f"{text!r} must be a date like 2026-11-01, or a time ago like 12h, 7d or 4w"
        raise typer.BadParameter(reason, param_hint="--since") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=now.tzinfo)


def usage_table(usage: Iterable[UsageView]) -> Table:
    rows = list(usage)
    table = Table(box=None, pad_edge=False, show_footer=bool(rows))
    total_s = sum(row.gpu_s for row in rows)
    table.add_column("owner", footer="all", overflow="fold")
    table.add_column("workflow")
    for name, total in (
        ("jobs", str(sum(row.jobs for row in rows))),
        ("attempts", str(sum(row.attempts for row in rows))),
        ("GPU seconds", f"{total_s:.1f}"),
    ):
        table.add_column(name, total, justify="right")
    for row in rows:
        sums = (str(row.jobs), str(row.attempts), f"{row.gpu_s:.1f}")
        table.add_row(escape(row.owner), row.workflow, *sums)
    return table
