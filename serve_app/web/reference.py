"""Render the OpenAPI document as one page of plain HTML.

The page has no script: the usual reference pages load theirs from other hosts, or need a policy
loose enough for their inline styles and scripts. Every text of the document is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

POLICY = (
    "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_METHODS = ("get", "post", "put", "patch", "delete")
_CODE = re.compile(r"`([^`]+)`")

Json = Mapping[str, Any]


def render(document: Json) -> str:
    """Return the page for an OpenAPI 3.1 document."""
    info = document["info"]
    operations = [
        _operation(method, path, item[method])
        for path, item in document["paths"].items()
        for method in _METHODS
        if method in item
    ]
    title = f"{info['title']} {info['version']}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<title>{_text(title)}</title><link rel="stylesheet" href="docs/reference.css">'
        f"<h1>{_text(title)}</h1><p>{_text(info.get('summary', ''))}</p>"
        f"<p>{_text(info.get('description', ''))} For programs: "
        f'<a href="openapi.json">openapi.json</a>.</p>{"".join(operations)}</html>'
    )


def _operation(method: str, path: str, operation: Json) -> str:
    name = operation["operationId"]
    access = "needs a token" if operation.get("security") else "no token needed"
    parameters = (
        (each["name"], each["in"], _needed(each.get("required")), each.get("description", ""))
        for each in operation.get("parameters", ())
    )
    answers = (
        (status, ", ".join(answer.get("content", ())), answer["description"])
        for status, answer in operation["responses"].items()
    )
    return (
        f'<section id="{_text(name)}">'
        f"<h2><span>{method.upper()}</span> <code>{_text(path)}</code></h2>"
        f"<p>{_text(operation.get('description', ''))} <small>{access}</small></p>"
        f"{_table('Parameter', parameters)}{_body(operation)}{_table('Answer', answers)}</section>"
    )


def _body(operation: Json) -> str:
    kinds: Json = operation.get("requestBody", {}).get("content", {})
    return "".join(_table(kind, _fields(media.get("schema", {}))) for kind, media in kinds.items())


def _fields(schema: Json) -> Iterable[tuple[str, str, str]]:
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        yield name, _needed(name in required), field.get("description", "")


def _needed(is_required: bool | None) -> str:
    return "required" if is_required else ""


def _table(title: str, rows: Iterable[tuple[str, ...]]) -> str:
    lines = "".join(
        f"<tr><th>{_text(first)}{''.join(f'<td>{_text(cell)}' for cell in others)}"
        for first, *others in rows
    )
    return f"<table><caption>{_text(title)}</caption>{lines}</table>" if lines else ""


def _text(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", escape(text))
