"""An operator's own workflow, which changes between a job and its retry."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from uuid import UUID

import pytest

from tests.fakes.receiver import SECRET
from tests.fakes.site import API, open_site, submission
from workflows.catalog import BUILT_IN


def _write_workflow(folder: Path, **changes: str) -> None:
    """Write `mine`: `enlarge` with other lines in its manifest, by their keys."""
    mine = shutil.copytree(BUILT_IN / "enlarge", folder / "mine", dirs_exist_ok=True)
    manifest = mine / "manifest.toml"
    text = manifest.read_text()
    for key, value in {"name": '"mine"', **changes}.items():
        text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text, count=1)
    manifest.write_text(text)


@pytest.mark.images
async def test_without_a_format_the_workflow_chooses(tmp_path: Path) -> None:
    """This holds for a job and for a batch, also for a workflow that cannot write PNG."""
    _write_workflow(tmp_path, formats='["webp"]', default_format='"webp"')
    async with open_site(workflows_dir=str(tmp_path)) as site, site.client() as client:
        for path in (API, "/api/v1/batches"):
            await client.post(path, **submission(workflow="mine"))
        refused = await client.post(API, **submission(workflow="mine", output_format="png"))
    assert [row.output_format for row in site.jobs.rows.values()] == ["webp", "webp"]
    assert (refused.status_code, "choose from webp" in refused.json()["detail"]) == (400, True)


@pytest.mark.retry
async def test_a_retry_is_checked_as_the_first_request_was(tmp_path: Path) -> None:
    """The workflow and rules of the retry's time apply: the format is no longer written, the limit
    is shorter, and webhooks are no longer sent."""
    _write_workflow(tmp_path, run_limit_s="100")
    mine = {"workflow": "mine", "run_limit_s": "90"}
    settings = {"workflows_dir": str(tmp_path)}
    hook = {"webhook_url": "https://example.com/hook"}
    async with open_site(**settings, webhook_secret=SECRET) as site, site.client() as client:
        asked = {"webp": {"output_format": "webp"}, "hook": hook, "plain": {}}
        ids = {
            name: (await client.post(API, **submission(**mine, **more))).json()["id"]
            for name, more in asked.items()
        }
        for job_id in ids.values():
            await client.post(f"{API}/{job_id}/cancel")
    _write_workflow(tmp_path, run_limit_s="60", formats='["png"]')
    async with open_site(**settings) as later, later.client() as client:
        later.jobs.rows.update(site.jobs.rows)
        told = {name: await client.post(f"{API}/{job_id}/retry") for name, job_id in ids.items()}
    assert told["webp"].status_code == 400
    assert "choose from png" in told["webp"].json()["detail"]
    assert told["hook"].json()["code"] == "invalid_webhook"
    assert told["plain"].status_code == 202
    assert later.jobs.rows[UUID(told["plain"].json()["id"])].options.run_limit_s == 60
