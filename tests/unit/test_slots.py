"""The slot that a worker's GPUs request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from comfy_pool.process.slots import physical_index

if TYPE_CHECKING:
    from collections.abc import Sequence


@pytest.mark.parametrize("gpu_ids", [[3], ["3"], ["3", "4"], (3,)])
def test_numbered_gpu_has_the_slot_of_its_number(gpu_ids: Sequence[int | str]) -> None:
    """Ray names a GPU by int or by str; of several, the first decides."""
    assert physical_index(gpu_ids) == 3


@pytest.mark.parametrize("gpu_ids", [[], ["GPU-5b1f2c"], ["MIG-3"], ["-1"], [""]])
def test_other_gpus_have_no_slot_of_their_own(gpu_ids: Sequence[int | str]) -> None:
    """No GPU, a UUID and a partition of a GPU do not determine a port."""
    assert physical_index(gpu_ids) is None
