"""Server-Sent Events, written and read without I/O: the server and the Python client share this.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MEDIA_TYPE = "text/event-stream"
# JSON Schema of an event as OpenAPI describes streams: each one by itself, fields as properties
EVENT_SCHEMA = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "id": {"type": "string", "description": "a place to resume from"},
        "event": {"type": "string"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
_LINE_END = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event. `id` is None when the event has no place in a stream to resume from."""

    event: str
    data: str
    id: str | None = None


def encode(event: ServerEvent) -> bytes:
    lines = [] if event.id is None else [f"id: {event.id}"]
    lines.append(f"event: {event.event}")
    lines += [f"data: {line}" for line in _LINE_END.split(event.data)]
    return ("\n".join(lines) + "\n\n").encode()


def encode_comment(text: str) -> bytes:
    """A line that readers skip: it shows that the connection lives."""
    return f": {text}\n\n".encode()


class Decoder:
    """Turns text, cut anywhere, into events. `last_id` is what resumes the stream."""

    def __init__(self, last_id: str | None = None) -> None:
        self.last_id = last_id
        self._rest = ""
        self._fields: dict[str, list[str]] = {}

    def feed(self, text: str) -> Iterator[ServerEvent]:
        """Every event that `text` completes. What a cut connection leaves unfinished is lost."""
        self._rest += text
        # A carriage return at the very end may be the first half of a line end.
        held = self._rest.endswith("\r")
        *lines, rest = _LINE_END.split(self._rest[:-1] if held else self._rest)
        self._rest = rest + "\r" if held else rest
        for line in lines:
            if line:
                self._take(line)
            elif (event := self._finish()) is not None:
                yield event

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        if name:  # otherwise it is a comment
            self._fields.setdefault(name, []).append(value.removeprefix(" "))

    def _finish(self) -> ServerEvent | None:
        fields, self._fields = self._fields, {}
        ids = fields.get("id")
        if ids is not None:
            self.last_id = ids[-1]
        if "data" not in fields:
            return None
        kind = fields.get("event", ["message"])[-1]
        return ServerEvent(kind, "\n".join(fields["data"]), ids[-1] if ids else None)
