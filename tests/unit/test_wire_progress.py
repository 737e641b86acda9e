"""The conversion of events to one fraction."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from comfy_pool.protocol.messages import (
    Cached,
    Executing,
    Message,
    NodeState,
    PromptProgress,
    StepProgress,
)
from comfy_pool.runs.progress import ProgressMeter
from restoration.engine_port import EngineProgress

PROMPT = {str(n): {"class_type": f"Class{n}", "inputs": {}} for n in range(1, 5)}


def state(**nodes: NodeState) -> PromptProgress:
    return PromptProgress("p", {name.removeprefix("n"): node for name, node in nodes.items()})


def test_each_node_is_an_equal_share() -> None:
    """Finished nodes count fully, the running one by its steps."""
    meter = ProgressMeter(PROMPT)
    done, half = NodeState("finished", 1, 1), NodeState("running", 4, 8)
    assert meter.update(state(n1=done, n2=half)) == EngineProgress(0.375, "Class2")
    assert meter.update(state(n1=done, n2=done)) == EngineProgress(0.5, "Class2")


def test_cached_nodes_are_done() -> None:
    """Cached nodes count from the start."""
    meter = ProgressMeter(PROMPT)
    assert meter.update(Cached("p", ["1", "2"])) == EngineProgress(0.5, "")
    assert meter.update(Executing("p", "3")) == EngineProgress(0.5, "Class3")


def test_an_older_engine_counts_one_node_at_a_time() -> None:
    """Without progress_state, a node is done when the next one begins."""
    meter = ProgressMeter(PROMPT)
    meter.update(Executing("p", "1"))
    assert meter.update(Executing("p", "2")) == EngineProgress(0.25, "Class2")
    assert meter.update(StepProgress("p", "2", 1, 2)) == EngineProgress(0.375, "Class2")


def test_what_changes_nothing_is_not_told() -> None:
    """ComfyUI reports each step twice; watchers receive it once."""
    meter = ProgressMeter(PROMPT)
    assert meter.update(state(n1=NodeState("running", 1, 2))) is not None
    assert meter.update(StepProgress("p", "1", 1, 2)) is None


def test_nodes_that_a_node_expands_into_are_not_counted() -> None:
    """They are not the prompt's; the class shown stays that of the original node."""
    meter = ProgressMeter(PROMPT)
    meter.update(Executing("p", "1"))
    expanded = PromptProgress("p", {"1.0.0.7": NodeState("finished", 1, 1)})
    assert meter.update(expanded) is None


_node_ids = st.sampled_from([*PROMPT, "1.0"])
_numbers = st.floats(allow_nan=False)
_states = st.builds(
    NodeState, st.sampled_from(["pending", "running", "finished", "error"]), _numbers, _numbers
)
_messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Cached, st.just("p"), st.lists(_node_ids)),
    st.builds(Executing, st.just("p"), st.one_of(st.none(), _node_ids)),
    st.builds(StepProgress, st.just("p"), _node_ids, _numbers, _numbers),
    st.builds(PromptProgress, st.just("p"), st.dictionaries(_node_ids, _states)),
)


@given(st.lists(_messages))
def test_the_fraction_never_falls_nor_passes_one(messages: list[Message]) -> None:
    """This holds for any order and numbers of events."""
    meter = ProgressMeter(PROMPT)
    told = [progress for message in messages if (progress := meter.update(message))]
    fractions = [progress.fraction for progress in told]
    assert fractions == sorted(fractions)
    assert all(0 <= fraction <= 1 for fraction in fractions)
