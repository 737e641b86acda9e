"""A worker's estimate of its loaded models, and its use."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from actors.execution.loaded_models import LoadedModels
from restoration.affinity import Affinity, Candidate
from restoration.errors import EngineOutOfMemory, UnknownWorkflow
from tests.fakes.engine import MemoryEngine
from tests.fakes.site import photo
from workflows.catalog import load_catalog

BEST, LOADED, OTHER = (Candidate(uuid4(), name) for name in ("cold", "warm", "cold"))


def first(affinity: Affinity, *candidates: Candidate) -> UUID:
    return affinity.order(candidates)[0]


@pytest.mark.affinity
def test_what_is_loaded_comes_first_and_nothing_is_left_out() -> None:
    """The others follow in their original order."""
    order = Affinity(frozenset({"warm"})).order([BEST, OTHER, LOADED])
    assert order == [LOADED.job_id, BEST.job_id, OTHER.job_id]


@pytest.mark.affinity
def test_a_job_is_passed_over_once() -> None:
    """The worker's next is that job; after it, another may be passed over."""
    affinity = Affinity(frozenset({"warm"}))
    assert first(affinity, BEST, LOADED) == LOADED.job_id
    assert first(affinity, BEST, LOADED) == BEST.job_id
    assert first(affinity, OTHER, LOADED) == LOADED.job_id


@pytest.mark.affinity
def test_a_job_that_was_passed_over_is_not_forgotten_for_another() -> None:
    """It is taken as soon as it is the best again, whichever was the best meanwhile."""
    affinity = Affinity(frozenset({"warm"}))
    assert first(affinity, BEST, LOADED) == LOADED.job_id
    assert first(affinity, OTHER, LOADED) == LOADED.job_id
    assert first(affinity, OTHER, LOADED) == OTHER.job_id
    assert first(affinity, BEST, LOADED) == BEST.job_id


@pytest.mark.affinity
def test_without_anything_loaded_the_best_is_the_best() -> None:
    """This also holds when no loaded workflow waits, or no job at all."""
    assert first(Affinity(), BEST, LOADED) == BEST.job_id
    assert first(Affinity(frozenset({"warm"})), BEST, OTHER) == BEST.job_id
    assert Affinity(frozenset({"warm"})).order([]) == []


@pytest.mark.dispatch
def test_it_knows_whether_others_waited() -> None:
    """The answer is for the last claim, and excludes the claimed job."""
    affinity = Affinity()
    told = []
    for candidates in ([BEST, OTHER], [BEST], []):
        affinity.order(candidates)
        told.append(affinity.others_waited)
    assert told == [True, False, False]


@pytest.mark.affinity
def test_the_last_jobs_models_are_what_is_loaded() -> None:
    """This holds until the engine is restarted, which unloads them."""
    engine = MemoryEngine(photo())
    loaded = LoadedModels(load_catalog(), engine)
    assert loaded.affinity.workflows == frozenset()
    loaded.will_run("enlarge")
    loaded.will_run("restore")
    loaded.forget_if_restarted()
    assert loaded.affinity.workflows == {"restore"}
    engine.starts += 1
    loaded.forget_if_restarted()
    assert loaded.affinity.workflows == frozenset()


@pytest.mark.affinity
async def test_warming_up_loads_a_workflows_models() -> None:
    """It runs each workflow on a picture of its own, before there is any job."""
    engine = MemoryEngine(photo())
    loaded = LoadedModels(load_catalog(), engine)
    await loaded.warm_up("restore")
    assert [run.output_node for run in engine.runs] == ["result"]
    assert loaded.affinity.workflows == {"restore"}


@pytest.mark.affinity
async def test_warming_up_may_fail() -> None:
    """A worker whose engine cannot do it still takes jobs; an unknown name is a mistake."""
    loaded = LoadedModels(load_catalog(), MemoryEngine(photo(), error=EngineOutOfMemory("full")))
    await loaded.warm_up("restore")
    assert loaded.affinity.workflows == frozenset()
    with pytest.raises(UnknownWorkflow):
        await loaded.warm_up("colourise")


@pytest.mark.affinity
def test_a_graph_of_a_users_own_leaves_nothing_known() -> None:
    """It may have loaded any model, and is in no catalog."""
    loaded = LoadedModels(load_catalog(), MemoryEngine(photo()))
    loaded.will_run("enlarge")
    assert loaded.affinity.workflows
    loaded.will_run("custom")
    assert loaded.affinity.workflows == frozenset()
