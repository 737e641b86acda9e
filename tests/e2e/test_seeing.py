"""Points 7 and 9 on the whole stack: what it tells of itself once a job has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from restoration.metrics import METRICS, PREFIX, Kind
from serve_app.client import ApiError
from tests.fakes.receiver import Receiver, receiving
from tests.fakes.site import photo
from tests.polling import until
from tests.stack import Stack

# What Ray puts on every series, and the format on a histogram's.
RAYS_LABELS = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "le"}
RAYS_PREFIXES = ("otel_scope_",)


async def _scrape(stack: Stack) -> Mapping[str, set[frozenset[str]]]:
    """Each metric of ours, by its exported name, with the label sets of its series."""
    assert stack.record.metrics is not None
    async with httpx.AsyncClient(trust_env=False) as http:
        text = (await http.get(stack.record.metrics)).text
    found: dict[str, set[frozenset[str]]] = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        if name.startswith(f"{PREFIX}restore_"):
            found[name] = {frozenset(_own(sample.labels)) for sample in family.samples}
    return found


def _own(labels: Mapping[str, str]) -> set[str]:
    return {name for name in labels if not name.startswith(RAYS_PREFIXES)} - RAYS_LABELS


async def test_07_what_is_documented_is_exported(stack: Stack) -> None:
    """After a job, a webhook and a refusal, Ray's agent has each metric, with its labels and
    no others; those of a GPU's memory where there is a GPU."""
    async with receiving() as receiver:
        await asyncio.to_thread(_work, stack, receiver)
        await receiver.wait_for(1)
    expected = {
        metric.exported: {frozenset(metric.labels)} for metric in METRICS if not metric.gpu_only
    }

    async def exported() -> bool:
        return expected.keys() <= (await _scrape(stack)).keys()

    await until(exported)
    found = await _scrape(stack)
    assert {name: labels for name, labels in found.items() if name in expected} == expected
    assert found.keys() <= {metric.exported for metric in METRICS}
    assert {m.kind for m in METRICS if m.exported in found} == set(Kind)


def _work(stack: Stack, receiver: Receiver) -> None:
    with stack.client() as client:
        job = client.submit(photo((64, 64)), workflow="enlarge", webhook_url=receiver.url())
        client.wait(job.id)
        with pytest.raises(ApiError):
            client.submit(b"no picture", workflow="enlarge")
