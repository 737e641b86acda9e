"""Refused webhook targets and receivers' tricks, on the complete stack.

The local stack's rules are looser than a cluster's by two settings: plain HTTP and loopback.
"""

from __future__ import annotations

import asyncio

import pytest

from serve_app.schemas.restorations import WebhookView
from tests.fakes.receiver import Receiver, drip, receiving, status
from tests.fakes.site import API, photo, submission
from tests.support.polling import until
from tests.support.stack import Stack


@pytest.mark.webhooks
@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
        "http://[fd00:ec2::254]/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://2852039166/",
        "http://0xa9.0xfe.0xa9.0xfe/",
        "http://10.0.0.1/",
        "http://0.0.0.0:8188/prompt",
        "http://2130706433:8188/prompt",
        "http://127.1/",
        "http://me@127.0.0.1/",
        "http://①②⑦.0.0.1/",
        "ftp://example.com/",
        "gopher://example.com:70/",
        "file:///etc/passwd",
    ],
)
def test_the_stack_is_not_sent_inside(stack: Stack, url: str) -> None:
    """Metadata services, private networks and disguised addresses are refused at the submission."""
    with stack.http() as http:
        answer = http.post(API, **submission(webhook_url=url))
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_webhook")


@pytest.mark.webhooks
async def test_the_stack_follows_no_redirect(stack: Stack) -> None:
    """A redirect is a failed delivery, and its target receives nothing."""
    async with receiving() as receiver, receiving() as elsewhere:
        receiver.default = status(307, Location=elsewhere.url())
        webhook = await _first_try(stack, receiver)
    assert webhook.last_error == "HTTP 307"
    assert elsewhere.seen == []


@pytest.mark.webhooks
async def test_the_stack_waits_for_no_dripping_answer(stack: Stack) -> None:
    """An endlessly trickling answer ends at the total time limit of a try."""
    async with receiving() as receiver:
        receiver.default = drip
        webhook = await _first_try(stack, receiver)
    assert webhook.last_error == "no response within 5 s"


async def _first_try(stack: Stack, receiver: Receiver) -> WebhookView:
    """Submit a job, and return its webhook after the first failed try and before the second."""

    def submit() -> str:
        with stack.client() as client:
            return str(client.submit(photo((64, 64)), webhook_url=receiver.url()).id)

    def look() -> WebhookView | None:
        with stack.client() as client:
            return client.get(job_id).webhook

    async def is_tried() -> bool:
        webhook = await asyncio.to_thread(look)
        return webhook is not None and webhook.last_error is not None

    job_id = await asyncio.to_thread(submit)
    await receiver.wait_for(1)
    await until(is_tried)
    found = await asyncio.to_thread(look)
    assert found is not None
    return found
