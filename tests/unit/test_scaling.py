"""The number of workers that the demand requires: without a clock, a cluster or Ray."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restoration.errors import InvalidSettings
from restoration.scaling import Demand, Scaler, ScalingPolicy, wanted_workers

NOTHING = Demand(0, 0, 0, 0)


def policy(
    jobs_per_worker: float = 1,
    min_workers: int = 0,
    max_workers: int = 8,
    warm_workers: int = 0,
    upscale_delay_s: float = 0,
    downscale_delay_s: float = 60,
) -> ScalingPolicy:
    return ScalingPolicy(
        jobs_per_worker,
        min_workers,
        max_workers,
        warm_workers,
        upscale_delay_s,
        downscale_delay_s,
    )


def batch(waiting: int, running: int = 0) -> Demand:
    return Demand(waiting, running, 0, 0)


def interactive(waiting: int, running: int = 0) -> Demand:
    return Demand(waiting, running, waiting, running)


@pytest.mark.scaling
def test_nothing_to_do_asks_for_no_worker() -> None:
    """The fleet goes to zero unless a minimum is set."""
    assert wanted_workers(policy(), NOTHING, current=5) == 0
    assert wanted_workers(policy(min_workers=2), NOTHING, current=5) == 2


@pytest.mark.scaling
def test_a_burst_asks_for_all_workers_at_once() -> None:
    """From zero, a long queue requests the whole fleet in one decision, and never more."""
    assert wanted_workers(policy(), interactive(5), current=0) == 5
    assert wanted_workers(policy(), batch(1000), current=0) == 8


@pytest.mark.scaling
def test_jobs_in_hand_count_like_waiting_ones() -> None:
    """The demand does not fall when a worker takes a job."""
    assert wanted_workers(policy(), batch(4), 0) == wanted_workers(policy(), batch(1, 3), 3) == 4


@pytest.mark.scaling
def test_batch_jobs_may_share_a_worker_interactive_ones_do_not() -> None:
    """`jobs_per_worker` is the target for batch jobs; no interactive job waits behind another."""
    shared = policy(jobs_per_worker=4)

    assert wanted_workers(shared, batch(9), current=0) == 3
    assert wanted_workers(shared, interactive(9), current=0) == 8
    assert wanted_workers(shared, Demand(6, 0, 2, 0), current=0) == 3


@pytest.mark.scaling
def test_workers_at_work_are_not_sent_away() -> None:
    """With several jobs per worker, a shrinking queue does not drain workers that have jobs."""
    assert wanted_workers(policy(jobs_per_worker=4), batch(0, 6), current=6) == 6


@pytest.mark.scaling
def test_warm_workers_are_beyond_those_at_work() -> None:
    """A warm worker is ready beside the busy ones; the limit still holds."""
    warm = policy(warm_workers=2)

    assert wanted_workers(warm, NOTHING, current=0) == 2
    assert wanted_workers(warm, interactive(0, running=3), current=3) == 5
    assert wanted_workers(warm, batch(1000), current=8) == 8


@pytest.mark.scaling
@given(
    demand=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    more=st.integers(0, 20),
    current=st.integers(0, 8),
    jobs_per_worker=st.floats(0.5, 8),
    warm=st.integers(0, 3),
)
def test_more_demand_never_asks_for_fewer_workers(
    demand: tuple[int, int], more: int, current: int, jobs_per_worker: float, warm: int
) -> None:
    """The result lies within the limits and grows with the queue."""
    rules = policy(jobs_per_worker=jobs_per_worker, min_workers=1, warm_workers=warm)
    waiting, running = demand

    fewer = wanted_workers(rules, batch(waiting, running), current)

    assert 1 <= fewer <= wanted_workers(rules, batch(waiting + more, running), current) <= 8


@pytest.mark.scaling
def test_the_way_up_waits_for_its_delay() -> None:
    """Only lasting demand requests workers, and then as many as it needs by then."""
    scaler = Scaler(policy(upscale_delay_s=5))

    assert scaler.decide(batch(1), 0, now_s=0) == 0
    assert scaler.decide(batch(2), 0, now_s=4) == 0
    assert scaler.decide(batch(3), 0, now_s=5) == 3


@pytest.mark.scaling
def test_the_way_down_waits_longer_and_forgets_no_peak() -> None:
    """Workers go after a whole delay below them, and as many stay as were needed within it."""
    scaler = Scaler(policy(downscale_delay_s=60))

    assert scaler.decide(batch(0, 2), 5, now_s=0) == 5
    assert scaler.decide(batch(0, 3), 5, now_s=30) == 5
    assert scaler.decide(NOTHING, 5, now_s=60) == 3
    assert scaler.decide(NOTHING, 3, now_s=61) == 3
    assert scaler.decide(NOTHING, 3, now_s=121) == 0


@pytest.mark.scaling
def test_demand_that_comes_back_starts_the_delay_again() -> None:
    """A pause shorter than the delay costs no worker."""
    scaler = Scaler(policy(downscale_delay_s=60))

    scaler.decide(NOTHING, 4, now_s=0)
    assert scaler.decide(batch(4), 4, now_s=50) == 4
    assert scaler.decide(NOTHING, 4, now_s=70) == 4
    assert scaler.decide(NOTHING, 4, now_s=130) == 0


@pytest.mark.scaling
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"jobs_per_worker": 0}, id="no job to a worker"),
        pytest.param({"min_workers": 9}, id="minimum above maximum"),
        pytest.param({"min_workers": -1}, id="negative minimum"),
        pytest.param({"downscale_delay_s": -1}, id="negative delay"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(wrong: dict[str, float]) -> None:
    """A mistake in the settings is reported when they are read, not when demand comes."""
    with pytest.raises(InvalidSettings):
        policy(**wrong)  # type: ignore[arg-type]
