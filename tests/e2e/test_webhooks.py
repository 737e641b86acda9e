"""Webhooks on the complete stack, from the form field to the signed request."""

from __future__ import annotations

import asyncio
import json

import pytest

from restoration.webhooks.messages import DeliveryStatus
from tests.fakes.receiver import Receiver, receiving, verify
from tests.fakes.site import photo
from tests.support.polling import until
from tests.support.stack import Stack


@pytest.mark.webhooks
async def test_the_end_of_a_job_is_told(stack: Stack) -> None:
    """The receiver gets the end of the job, signed with the stack's own secret."""
    async with receiving() as receiver:
        job_id = await asyncio.to_thread(_submit, stack, receiver)
        await receiver.wait_for(1)
        await until(lambda: asyncio.to_thread(_is_delivered, stack, job_id))
    [seen] = receiver.seen
    secret = await asyncio.to_thread(stack.restore, "webhook-secret")
    assert verify(secret.stdout.strip(), seen.headers, seen.body)
    told = json.loads(seen.body)
    assert (told["type"], told["data"]["id"]) == ("restoration.succeeded", job_id)


def _submit(stack: Stack, receiver: Receiver) -> str:
    with stack.client() as client:
        return str(client.submit(photo((64, 64)), webhook_url=receiver.url()).id)


def _is_delivered(stack: Stack, job_id: str) -> bool:
    with stack.client() as client:
        webhook = client.get(job_id).webhook
        return webhook is not None and webhook.status is DeliveryStatus.DELIVERED
