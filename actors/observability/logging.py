"""Configures structured logs of the processes in the cluster: one line for each event.

Lines are JSON or readable text, and include the job's id where a job is in hand. The local stack's
own processes do not use it: they report errors to the user who started them.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog


def configure_logging(style: Literal["json", "console"]) -> None:
    """Send this process's structlog lines to standard error. Idempotent."""
    # Tracebacks omit local variables, which may contain tokens and passwords.
    renderers: tuple[structlog.typing.Processor, ...]
    if style == "json":
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        renderers = (
            structlog.processors.ExceptionRenderer(tracebacks),
            structlog.processors.JSONRenderer(),
        )
    else:
        renderers = (
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
