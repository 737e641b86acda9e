"""A short `make chaos`: accepted jobs survive while every part of the stack is killed."""

from __future__ import annotations

import pytest

from tests.chaos.batch_script import OWNER as BATCH_OWNER
from tests.chaos.breaking import Plan
from tests.chaos.driver import run
from tests.chaos.users import OWNERS as HTTP_OWNERS

# Every part once; faults that cost a job an attempt are spaced by others.
KINDS = (
    "ComfyUI hung for good",
    "Postgres killed",
    "ingress killed",
    "GPU worker killed",
    "status actor killed",
    "maintenance killed",
    "SeaweedFS killed",
    "dispatcher killed",
    "GPU worker stopped",
    "Valkey killed, data deleted",
    "Serve proxy killed",
    "engine's connections dropped",
    "Postgres stopped",
    "image process killed",
    "Serve controller killed",
    "SeaweedFS stopped",
    "ComfyUI killed",
)
# Dropping other processes' connections needs a right that the kernel may refuse.
NEED_A_RIGHT = {"engine's connections dropped"}


@pytest.mark.durability
@pytest.mark.real_engine
@pytest.mark.usefixtures("engine_install")
def test_no_accepted_job_is_lost_doubled_or_wrong_whatever_dies() -> None:
    """Each part is killed or stopped, one after another. Every accepted job ends once, with the
    right picture and a webhook that says so, and no engine is left behind."""
    lines: list[str] = []
    # On a slow machine heartbeats come late, and jobs end rarely.
    plan = Plan(seed=7, kinds=KINDS, faults_every_s=3.0, lease_s=10.0, stuck_s=600.0)
    verdict = run(plan, lines.append)
    figures = [*verdict.table(), *verdict.troubles.items()]
    report = "\n".join([*lines, *verdict.offenders, *(f"{n}: {v}" for n, v in figures)])
    assert verdict.ok, report
    assert verdict.failed == 0, report  # no job meets enough of these faults to use up its attempts
    assert verdict.broken_attempts > 0, report
    assert verdict.webhooks > 0, report
    assert min(verdict.successes.get(owner, 0) for owner in (*HTTP_OWNERS, BATCH_OWNER)) > 0, report
    assert not [what for what in verdict.troubles if not what.startswith("submit")], report
    assert set(KINDS) - set(verdict.faults) <= NEED_A_RIGHT, report
