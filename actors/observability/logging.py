"""Structured logs: one line an event, as JSON or for a person; the job's id is on each.

For what runs in the cluster. The local stack's services and its token issuer have no such lines:
they tell whoever started them what went wrong.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog


def configure_logging(style: Literal["json", "console"]) -> None:
    """Send this process's structlog lines to standard error; may be called again."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *(_JSON if style == "json" else _console()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


# Tracebacks without local variables: those hold tokens and passwords.
_JSON: tuple[structlog.typing.Processor, ...] = (
    structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    ),
    structlog.processors.JSONRenderer(),
)


def _console() -> tuple[structlog.typing.Processor, ...]:
    return (
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        ),
    )
