"""Compare the photos accepted per second with the same work without HTTP and Ray."""

from __future__ import annotations

import asyncio
import io
import statistics
from collections.abc import Mapping, Sequence

from PIL import Image

from actors.submission.requests import SubmissionRequest
from benchmarks.figures import Bench, Figure, Goal
from benchmarks.load import Load, apply_load
from benchmarks.service_client import WORKFLOW, ServiceClient, original
from restoration.settings import load_settings
from serve_app.local.temporary import LocalStack
from serve_app.services import open_services

CLIENTS = 64
ROUNDS, ROUND_S = 3, 8.0
PHOTO_BYTES = 200_000
# One job occupies the worker, so that the cores are free for submissions.
OCCUPIED = {"seconds": 600.0, "size": 64}
LIMITS = {
    "MAX_REQUESTS_PER_MINUTE": "0",
    "MAX_WAITING_PER_OWNER": "0",
    "MAX_UPLOADS_IN_FLIGHT": "200",
}


def submits(bench: Bench) -> Sequence[Figure]:
    """Measure in turns on separate services, because jobs still waiting at the end would disturb
    others."""
    with bench.new_stack(1, LIMITS) as stack:
        settings = {**stack.environ, "LOCAL_ISSUER_URL": stack.record.issuer or ""}
        rounds = asyncio.run(_rounds(bench, stack, settings))
    return [
        Figure(
            "submits/s, over the same without HTTP and Ray",
            [ours.per_s / plain.per_s for ours, plain in rounds],
            Goal(0.8, at_least=True, tolerance=0.1),
            parts=f"{statistics.median(ours.per_s for ours, _ in rounds):.0f}/s over "
            f"{statistics.median(plain.per_s for _, plain in rounds):.0f}/s",
        ),
        Figure(
            f"p99 of a submit over its p50, {CLIENTS} clients",
            [ours.percentile_s(99) / ours.percentile_s(50) for ours, _ in rounds],
            Goal(10.0, at_least=False, tolerance=0.1),
            parts=f"{1e3 * statistics.median(o.percentile_s(99) for o, _ in rounds):.0f} ms over "
            f"{1e3 * statistics.median(o.percentile_s(50) for o, _ in rounds):.0f} ms",
        ),
    ]


def photo_of(size_bytes: int) -> bytes:
    """Return a JPEG of about that size."""
    picture = original("china").resize((1280, 848), Image.Resampling.LANCZOS)
    for quality in range(95, 20, -1):
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=quality)
        if out.tell() <= size_bytes:
            break
    return out.getvalue()


async def _rounds(
    bench: Bench, stack: LocalStack, environ: Mapping[str, str]
) -> list[tuple[Load, Load]]:
    photo = photo_of(PHOTO_BYTES)
    rounds = []
    async with ServiceClient.to(stack, connections=CLIENTS) as client:
        await client.submit(WORKFLOW, OCCUPIED, photo)
        for n in range(ROUNDS):
            ours = await apply_load(lambda: client.submit("enlarge", {}, photo), CLIENTS, ROUND_S)
            plain = await _without_http(environ, photo)
            bench.say(f"  submits, round {n + 1}: {ours.per_s:.0f}/s over {plain.per_s:.0f}/s")
            rounds.append((ours, plain))
    return rounds


async def _without_http(environ: Mapping[str, str], photo: bytes) -> Load:
    """Submit without HTTP in one process, as the stack has one ingress replica."""
    services = open_services(load_settings(environ))
    request = SubmissionRequest(owner="bench", image=photo, workflow="enlarge")
    try:
        return await apply_load(lambda: services.submission.submit(request), CLIENTS, ROUND_S)
    finally:
        await services.aclose()
