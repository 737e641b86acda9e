"""Quotas against the running service, with limits in the token."""

from __future__ import annotations

from uuid import uuid4

import httpx
import pytest

from serve_app.auth.tokens import QUOTAS_CLAIM
from tests.fakes.site import API, photo, submission
from tests.support.polling import wait_until
from tests.support.stack import Stack


def _client(stack: Stack, owner: str, **quotas: int) -> httpx.Client:
    client = stack.http()
    token = stack.token(owner, claims={QUOTAS_CLAIM: quotas})
    client.headers["Authorization"] = f"Bearer {token}"
    return client


@pytest.mark.quotas
@pytest.mark.parametrize(
    ("quotas", "code"),
    [
        ({"requests_per_minute": 2}, "rate_limited"),
        ({"stored_bytes": 3 * len(photo()) - 1}, "storage_full"),
    ],
)
def test_beyond_a_quota_is_429(stack: Stack, quotas: dict[str, int], code: str) -> None:
    """After two submissions the third is refused with the reason and a time to retry; accepted jobs
    can still be read."""
    with _client(stack, f"quota-{code}", **quotas) as client:
        accepted = [client.post(API, **submission()) for _ in range(2)]
        refused = client.post(API, **submission())
        shown = [client.get(answer.headers["location"]) for answer in accepted]
    assert [answer.status_code for answer in accepted] == [202, 202]
    assert (refused.status_code, refused.json()["code"]) == (429, code)
    assert int(refused.headers["retry-after"]) >= 1
    assert [answer.status_code for answer in shown] == [200, 200]


@pytest.mark.quotas
def test_answers_tell_what_is_left(stack: Stack) -> None:
    """Answers have the draft's rate limit headers, from the counts in Redis."""
    with _client(stack, "quota-headers", requests_per_minute=60) as client:
        answer = client.post(f"{API}/{uuid4()}/cancel")
    assert answer.status_code == 404
    assert answer.headers["ratelimit-policy"] == '"requests";q=60;w=60'
    assert answer.headers["ratelimit"].startswith('"requests";r=59;t=')


@pytest.mark.quotas
def test_jobs_beyond_the_quota_wait_and_run(stack: Stack) -> None:
    """Three jobs of an owner who may run one at a time all succeed: the end of one starts the next,
    through dispatcher and workers. The store's own tests show that no two run at once."""
    with _client(stack, "quota-running", running_jobs=1) as client:
        paths = [client.post(API, **submission()).headers["location"] for _ in range(3)]

        def all_succeeded() -> bool:
            return {client.get(path).json()["status"] for path in paths} == {"succeeded"}

        wait_until(all_succeeded)
