"""Point 8: a script finds a Ray on loopback at that address, and any other as Ray would."""

from __future__ import annotations

import pytest
from ray._private import ray_constants

from actors.cluster.local import find_ray


@pytest.mark.exposure
@pytest.mark.parametrize(
    ("address", "stays"),
    [
        ("127.0.0.1:6379", True),
        ("localhost:6379", True),
        ("10.0.0.1:6379", False),
        ("head.example.com:6379", False),
    ],
)
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_only_a_ray_on_loopback_is_looked_for_there(
    monkeypatch: pytest.MonkeyPatch, address: str, stays: bool, by: str
) -> None:
    """Ray would replace 127.0.0.1 by the machine's own address, where no process listens."""
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # as this process has it
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if by == "variable":
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert find_ray("auto" if by == "variable" else address) == address
    assert ray_constants.ENABLE_RAY_CLUSTER is not stays
