"""Batches as clients send them: valid and broken multipart forms with photos."""

from __future__ import annotations

from typing import Any

from tests.fakes.site import Site, photo

BATCHES = "/api/v1/batches"
BROKEN = photo((64, 64), "JPEG")[:200]
MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    """Return photos for httpx, which sends the other form fields first."""
    return [("image", (f"photo {index}.png", image)) for index, image in enumerate(images)]


async def submit(site: Site, *images: bytes, **fields: str) -> dict[str, Any]:
    async with site.client() as client:
        answer = await client.post(BATCHES, files=files(*images), data=fields)
    assert answer.status_code == 202, answer.text
    body: dict[str, Any] = answer.json()
    return body


def form_part(name: str, data: bytes, filename: str | None = None) -> bytes:
    quoted = "" if filename is None else f'; filename="{filename}"'
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"{quoted}\r\n\r\n'
    return head.encode() + data + b"\r\n"


IMAGE = form_part("image", photo(), "a.png")
