"""Webhooks: payload, signature, allowed addresses and retries."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from restoration.errors import InvalidSettings, InvalidWebhook
from restoration.jobs import Failure, Job, JobStatus
from restoration.settings import load_settings
from restoration.webhooks.messages import (
    RetrySchedule,
    message_id,
    payload,
    secret_key,
    signed_headers,
)
from restoration.webhooks.urls import WebhookRules, check_url, host_of
from serve_app.local.record import webhook_secret
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.receiver import SECRET, verify
from tests.support.samples import new_job

PUBLIC = WebhookRules(enabled=True)
LOCAL = WebhookRules(True, allow_http=True, networks=(ip_network("127.0.0.0/8"), ip_network("::1")))
DAY_S = 24 * 3600


async def _ended(**changes: Any) -> Job:
    store = MemoryJobStore(clock=lambda: datetime(2026, 1, 2, 3, 4, 5, 678900, UTC))
    job, _ = await store.insert(new_job())
    return replace(await store.request_cancel(job.id), **changes)


@pytest.mark.webhooks
def test_the_signature_is_the_standards() -> None:
    """The vector is from the tests of Standard Webhooks' reference implementations."""
    key = secret_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    assert signed_headers(
        key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    ) == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@pytest.mark.webhooks
@pytest.mark.parametrize("spoilt", [None, "webhook-id", "webhook-timestamp", "body", "secret"])
async def test_a_receiver_can_tell_what_is_ours(spoilt: str | None) -> None:
    """Another implementation accepts our signatures, and rejects a change in any part."""
    job = await _ended()
    body, secret, now_s = payload(job), SECRET, int(datetime.now(UTC).timestamp())
    headers = signed_headers(secret_key(SECRET), message_id(job.id), now_s, body)
    match spoilt:
        case "body":
            body += b" "
        case "secret":
            secret = SECRET[:-3] + "8A="
        case "webhook-id" | "webhook-timestamp":
            headers[spoilt] += "0" if spoilt == "webhook-id" else ""
            headers["webhook-timestamp"] = str(now_s + (spoilt == "webhook-timestamp"))
    assert verify(secret, headers, body) is (spoilt is None)


@pytest.mark.webhooks
@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (JobStatus.SUCCEEDED, None),
        (JobStatus.CANCELLED, None),
        (JobStatus.FAILED, Failure("engine_failed", "a node raised: ü")),
    ],
)
async def test_the_payload_says_how_the_job_ended(
    status: JobStatus, failure: Failure | None
) -> None:
    """Type, time and data follow the specification's recommendation, without internal fields."""
    job = await _ended(status=status, failure=failure)
    path = f"/api/v1/restorations/{job.id}"
    assert json.loads(payload(job)) == {
        "type": f"restoration.{status}",
        "timestamp": "2026-01-02T03:04:05.678900Z",
        "data": {
            "id": str(job.id),
            "status": status,
            "failure": {"code": failure.code, "message": failure.message} if failure else None,
            "links": {"self": path, "result": f"{path}/result"},
        },
    }


@pytest.mark.webhooks
async def test_nothing_is_said_of_a_job_that_goes_on() -> None:
    """There is no payload before the end."""
    with pytest.raises(ValueError, match="not ended"):
        payload(await _ended(finished_at=None))


@pytest.mark.webhooks
@pytest.mark.parametrize(
    "secret",
    ["", "whsec_", "whsec_c2hvcnQ=", SECRET.removeprefix("whsec_"), "whsec_???", SECRET * 3],
)
def test_a_secret_that_is_none_is_refused(secret: str) -> None:
    """A secret that is too short or long, not base64, or without prefix is refused at the start."""
    with pytest.raises(ValueError, match="openssl rand"):
        secret_key(secret)


@pytest.mark.webhooks
def test_a_wrong_secret_is_told_by_its_variable_and_not_shown() -> None:
    """A refused WEBHOOK_SECRET is named, but its value is not logged."""
    minimal = {"DATABASE_URL": "postgresql://d", "REDIS_URL": "redis://r", "S3_BUCKET": "b"}
    with pytest.raises(InvalidSettings, match=r"WEBHOOK_SECRET: .*whsec_") as refused:
        load_settings({**minimal, "WEBHOOK_SECRET": "hunter2"})
    assert "hunter2" not in str(refused.value)
    settings = load_settings({**minimal, "WEBHOOK_SECRET": SECRET})
    assert settings.webhook_rules == PUBLIC
    assert SECRET not in repr(settings)


@pytest.mark.webhooks
def test_the_local_stack_has_a_secret_of_its_own(tmp_path: Path) -> None:
    """It is made once, kept, valid, and readable by its owner alone."""
    secret = webhook_secret(tmp_path)
    assert len(secret_key(secret)) == 32
    assert webhook_secret(tmp_path) == secret
    assert [path.stat().st_mode & 0o077 for path in tmp_path.iterdir()] == [0]


@pytest.mark.webhooks
def test_delays_double_with_jitter() -> None:
    """5 s, 10 s, ... up to an hour, each at least half of itself."""
    schedule = RetrySchedule()
    for tries, ceiling in [(1, 5), (2, 10), (3, 20), (10, 2560), (11, 3600), (5000, 3600)]:
        delays = [schedule.delay_s(tries, 0) for _ in range(50)]
        assert all(delay is not None and ceiling / 2 <= delay <= ceiling for delay in delays)
        assert len(set(delays)) > 1


@pytest.mark.webhooks
def test_a_receiver_may_ask_for_patience() -> None:
    """Retry-After delays a try, but for an hour at most."""
    schedule = RetrySchedule()
    assert schedule.delay_s(1, 0, asked_s=90) == 90
    assert schedule.delay_s(1, 0, asked_s=float("inf")) == 3600


@pytest.mark.webhooks
def test_after_a_day_it_is_over() -> None:
    """The last try comes when 24 h are over."""
    schedule = RetrySchedule()
    assert schedule.delay_s(30, DAY_S - 10) == 10
    assert schedule.delay_s(31, DAY_S) is None
    age_s, tries = 0.0, 1
    while (delay_s := schedule.delay_s(tries, age_s)) is not None:
        age_s, tries = age_s + delay_s, tries + 1
    assert timedelta(seconds=age_s) == timedelta(days=1)
    assert 30 < tries < 70


@pytest.mark.webhooks
@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "HTTPS://Example.COM:8443/a/b?c=d&e=%20",
        "https://hooks.example.co.uk/T0/B0",
        "https://93.184.216.34/hook",
        "https://[2606:2800:220:1::1]:443/hook",
        "https://xn--bcher-kva.example/",
    ],
)
def test_public_addresses_are_accepted(url: str) -> None:
    """HTTPS to a public name or address is accepted."""
    check_url(url, PUBLIC)


@pytest.mark.webhooks
@pytest.mark.parametrize(
    "url",
    [
        "http://example.com",
        "https://localhost/",
        "https://sub.localhost/",
        "https://postgres:5432/",
        "https://db.internal/",
        "https://printer.local/",
        "https://127.0.0.1/",
        "https://10.1.2.3/",
        "https://169.254.169.254/latest/meta-data",
        "https://100.64.0.1/",
        "https://0.0.0.0/",
        "https://224.0.0.1/",
        "https://127.1/",
        "https://2130706433/",
        "https://0x7f.0.0.1/",
        "https://1.0x7f000001/",
        "https://0177.0.0.1/",
        "https://[::1]/",
        "https://[fd00::1]/",
        "https://[fe80::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://[::]/",
        "https://example.com:22/",
        "https://93.184.216.34:6379/",
    ],
)
def test_addresses_that_are_not_public_are_refused(url: str) -> None:
    """Plain HTTP, other services' ports, this machine and its network are refused however spelt."""
    with pytest.raises(InvalidWebhook):
        check_url(url, PUBLIC)


@pytest.mark.webhooks
@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "ftp://example.com",
        "https://",
        "https:///path",
        "https://user:password@example.com/",
        "https://example.com#fragment",
        "https://example.com\\@127.0.0.1/",
        "https://exa mple.com/",
        "https://example.com/\r\nX-Evil: 1",
        "https://example.com/\n",
        "https://bücher.example/",
        "https://\u212aelvin.example/",
        "https://example.com:0/",
        "https://example.com:65536/",
        "https://example.com./",
        "https://example.com/" + "a" * 2048,
    ],
)
@pytest.mark.parametrize("rules", [PUBLIC, LOCAL], ids=["public", "local"])
def test_what_two_parsers_could_read_differently_is_refused(url: str, rules: WebhookRules) -> None:
    """The grammar is narrow, with or without public hosts only."""
    with pytest.raises(InvalidWebhook, match=r"must be a URL like|at most"):
        check_url(url, rules)


@pytest.mark.webhooks
@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:4711/", "http://[::1]:1/", "http://localhost/", "https://app.internal:99/"],
)
def test_networks_of_ones_own_can_be_allowed(url: str) -> None:
    """An address in one of them, and a name that may resolve there, is allowed on any port."""
    check_url(url, LOCAL)
    with pytest.raises(InvalidWebhook):
        check_url(url, WebhookRules(enabled=True, allow_http=True))


@pytest.mark.webhooks
@pytest.mark.parametrize(
    "url", ["http://10.1.2.3/", "http://169.254.169.254/", "http://2130706433/", "http://0.0.0.0/"]
)
def test_one_network_does_not_allow_another(url: str) -> None:
    """Odd spellings are refused even for an allowed address."""
    with pytest.raises(InvalidWebhook):
        check_url(url, LOCAL)


@pytest.mark.webhooks
def test_the_host_is_told_by_the_same_grammar() -> None:
    """Deliveries are grouped by host: without port, case and brackets."""
    assert host_of("https://Hooks.Example.com:8443/x") == "hooks.example.com"
    assert host_of("https://[2606:2800::1]/") == "2606:2800::1"
