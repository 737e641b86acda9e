"""The checks of `restore doctor` that contact services: Postgres, Redis, S3, and the clock."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from contextlib import aclosing
from datetime import UTC, datetime

from comfy_pool.doctor.engine import Finding
from restoration.errors import DependencyUnavailable, SetupError
from restoration.settings import load_settings
from serve_app.services import open_services

# Tokens are valid for hours and signed URLs for minutes; Auth0 and S3 tolerate little more.
CLOCK_OFF_S = 5.0
_WHERE = {"Postgres": "DATABASE_URL", "Redis": "REDIS_URL", "S3": "S3_BUCKET, S3_ENDPOINT_URL"}


async def examine_services(environ: Mapping[str, str]) -> list[Finding]:
    """Check the services that the environment names; return nothing if it names none.

    It takes seconds if a service does not respond.
    """
    if not environ.get("DATABASE_URL") and not environ.get("DATABASE_URL_FILE"):
        return []  # the local stack starts its own
    try:
        services = open_services(load_settings(environ))
    except SetupError as error:
        remedy = "correct the settings; .env.example describes them"
        return [Finding("settings", False, error.message, remedy)]
    async with aclosing(services):
        findings = [
            await _responds("Postgres", services.jobs.ping()),
            await _responds("Redis", services.status.ping()),
            await _responds("S3", services.blobs.ping()),
        ]
        before = datetime.now(UTC)
        try:
            theirs = (await services.workers.queue()).at
        except DependencyUnavailable:
            return findings  # reported by the check of Postgres
        after = datetime.now(UTC)
    off_s = max((before - theirs).total_seconds(), (theirs - after).total_seconds(), 0.0)
    return [*findings, clock_finding(off_s)]


async def _responds(name: str, ping: Awaitable[None]) -> Finding:
    try:
        await ping
    except DependencyUnavailable as error:
        remedy = f"check that it runs and can be reached from here; correct {_WHERE[name]}"
        return Finding(name, False, error.message, remedy)
    return Finding(name, True, "responds")


def clock_finding(off_s: float) -> Finding:
    ok = off_s <= CLOCK_OFF_S
    off = f"within {CLOCK_OFF_S:g} s of" if ok else f"{off_s:.0f} s off"
    remedy = "" if ok else "enable NTP on both machines (timedatectl set-ntp true)"
    return Finding("clock", ok, f"{off} the clock of Postgres", remedy)
