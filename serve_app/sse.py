"""Server-Sent Events, encoded and decoded without I/O, for the server and the Python client.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MEDIA_TYPE = "text/event-stream"
# JSON Schema of a single event, its fields as properties, as OpenAPI describes event streams
EVENT_SCHEMA = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "id": {
            "type": "string",
            "description": "Value of Last-Event-ID that resumes the stream after this event.",
        },
        "event": {"type": "string"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
_LINE_END = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event. `id` is None for an event that a stream cannot be resumed from."""

    event: str
    data: str
    id: str | None = None


def encode(event: ServerEvent) -> bytes:
    """Return an event in the wire format; data of several lines takes a `data` field for each."""
    lines = [] if event.id is None else [f"id: {event.id}"]
    lines.append(f"event: {event.event}")
    lines += [f"data: {line}" for line in _LINE_END.split(event.data)]
    return ("\n".join(lines) + "\n\n").encode()


def encode_comment(text: str) -> bytes:
    """Return a comment, which readers ignore: it shows that the connection is alive."""
    return f": {text}\n\n".encode()


class Decoder:
    """Decodes text, in chunks of any size, into events. `last_id` is the id to resume from."""

    def __init__(self, last_id: str | None = None) -> None:
        self.last_id = last_id
        self._rest = ""
        self._fields: dict[str, list[str]] = {}

    def feed(self, text: str) -> Iterator[ServerEvent]:
        """Yield every event that `text` completes.

        An event that a lost connection cuts off is dropped.
        """
        self._rest += text
        # A carriage return at the very end may be the first half of a line end.
        held = self._rest.endswith("\r")
        *lines, rest = _LINE_END.split(self._rest[:-1] if held else self._rest)
        self._rest = rest + "\r" if held else rest
        for line in lines:
            if line:
                name, _, value = line.partition(":")
                if name:  # otherwise it is a comment
                    self._fields.setdefault(name, []).append(value.removeprefix(" "))
                continue
            fields, self._fields = self._fields, {}
            ids = fields.get("id")
            if ids is not None:
                self.last_id = ids[-1]
            if "data" in fields:
                kind = fields.get("event", ["message"])[-1]
                yield ServerEvent(kind, "\n".join(fields["data"]), ids[-1] if ids else None)
