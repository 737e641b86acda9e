"""Places shared in turns: order, limits and cancellations, and any sequence of calls on a model."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from restoration.errors import RateLimited, TooManyAtOnce, TooManyUploads
from restoration.limits.fair_places import (
    FairPlaces,
    Owner,
    Place,
    Share,
    all_but_one,
    as_many_as_are_free,
)


async def settle() -> None:
    """Let every task run as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def order_of_service(owners: Iterable[str]) -> list[tuple[str, int]]:
    """Serve one request for each of `owners`, which all wait for one place; each has a number."""
    places = FairPlaces(1, "pictures")
    served: list[tuple[str, int]] = []

    async def one(owner: str, number: int) -> None:
        async with places.turn(owner):
            served.append((owner, number))

    async with asyncio.TaskGroup() as group:
        with places.take_now("first"):
            for number, owner in enumerate(owners):
                group.create_task(one(owner, number))
            await settle()
    return served


async def test_an_owner_that_comes_late_waits_for_one_request_of_the_greedy_one() -> None:
    served = await order_of_service("a" * 100 + "b")
    assert served.index(("b", 100)) == 1


async def test_owners_take_turns_and_each_is_served_in_its_order() -> None:
    served = await order_of_service("aaabbc")
    assert served == [("a", 0), ("b", 3), ("c", 5), ("a", 1), ("b", 4), ("a", 2)]


async def test_an_owner_that_asks_again_and_again_gets_no_more_than_its_turns() -> None:
    """An owner that asks again at once goes behind those who wait and hold as few places."""
    places = FairPlaces(1, "pictures")
    served: list[str] = []

    async def again_and_again(owner: str) -> None:
        for _ in range(6):
            async with places.turn(owner):
                served.append(owner)
                await asyncio.sleep(0)

    async def one(owner: str) -> None:
        async with places.turn(owner):
            served.append(owner)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(again_and_again("loop"))
        for owner in ("a", "a", "a", "b", "b", "b"):
            group.create_task(one(owner))
    assert Counter(served[:9]) == {"loop": 3, "a": 3, "b": 3}


@pytest.mark.parametrize(("number", "alone"), [(1, 1), (2, 1), (3, 2), (8, 7)])
async def test_a_greedy_owner_leaves_a_place_to_the_others(number: int, alone: int) -> None:
    places = FairPlaces(number, "pictures")
    greedy = [asyncio.ensure_future(places.take("greedy")) for _ in range(20)]
    await settle()
    assert places.held("greedy") == alone
    modest = asyncio.ensure_future(places.take("modest"))
    await settle()
    assert modest.done() == (number > 1)
    for task in [*greedy, modest]:
        task.cancel()
    await asyncio.gather(*greedy, modest, return_exceptions=True)


async def test_several_greedy_owners_leave_places_where_they_are_held_for_long() -> None:
    places = FairPlaces(64, "uploads", as_many_as_are_free)
    for owner in ("a", "b", "c", "d"):
        with suppress(TooManyAtOnce):
            for _ in range(64):
                places.take_now(owner)
    assert [places.held(owner) for owner in ("a", "b", "c", "d")] == [32, 16, 8, 4]
    places.take_now("e")


async def test_the_service_itself_may_hold_every_place_and_takes_turns() -> None:
    places = FairPlaces(2, "pictures")
    both = [places.take_now(None), places.take_now(None)]
    waiting = [asyncio.ensure_future(places.take(owner)) for owner in (None, None, "a")]
    await settle()
    both[0].give_back()
    await settle()
    assert [task.done() for task in waiting] == [False, False, True]
    both[1].give_back()
    await settle()
    assert [task.done() for task in waiting] == [True, False, True]
    (await waiting[0]).give_back()
    await asyncio.gather(*waiting)


async def test_one_too_many_that_waits_is_refused_with_a_clear_error() -> None:
    places = FairPlaces(1, "uploads", max_waiting=2, error=TooManyUploads)
    held = places.take_now("a")
    waiting = [asyncio.ensure_future(places.take("a")) for _ in range(2)]
    await settle()
    with pytest.raises(TooManyUploads, match="2 of your uploads are waiting") as refused:
        await places.take("a")
    assert refused.value.details == {"limit": 2, "retry_after_s": 2}
    other = asyncio.ensure_future(places.take("b"))  # the limit is each owner's own
    await settle()
    assert (places.waiting("a"), places.waiting("b")) == (2, 1)
    held.give_back()
    for task in (waiting[0], other, waiting[1]):
        (await task).give_back()
    assert places.free == 1


async def test_without_waiting_the_error_says_whether_the_owner_or_all_hold_too_many() -> None:
    places = FairPlaces(3, "event streams")
    places.take_now("a")
    places.take_now("a")
    with pytest.raises(TooManyAtOnce, match="2 of your event streams are in progress"):
        places.take_now("a")
    places.take_now("b")
    with pytest.raises(TooManyAtOnce, match="3 event streams are in progress"):
        places.take_now("c")
    assert not issubclass(TooManyAtOnce, RateLimited)


async def test_a_place_that_is_lent_to_a_task_in_the_moment_it_is_cancelled_goes_on() -> None:
    places = FairPlaces(1, "pictures")
    held = places.take_now("a")
    cancelled = asyncio.ensure_future(places.take("b"))
    patient = asyncio.ensure_future(places.take("c"))
    await settle()
    held.give_back()  # to b, whose task has not run since
    cancelled.cancel()
    async with asyncio.timeout(5):
        (await patient).give_back()
    assert places.free == 1


async def test_a_cancelled_request_does_not_cost_its_owner_the_turn() -> None:
    places = FairPlaces(1, "pictures")
    held = places.take_now("x")
    first, second, other = (asyncio.ensure_future(places.take(owner)) for owner in ("a", "a", "b"))
    await settle()
    first.cancel()
    held.give_back()  # before the cancelled task could report that it no longer waits
    await settle()
    assert (second.done(), other.done()) == (True, False)
    (await second).give_back()
    (await other).give_back()


async def test_an_error_in_the_block_gives_the_place_back_once() -> None:
    places = FairPlaces(2, "pictures")
    with pytest.raises(ZeroDivisionError):
        async with places.turn("a"):
            _ = 1 // 0
    place = places.take_now("a")
    place.give_back()
    place.give_back()
    assert places.free == 2


class TurnsModel(RuleBasedStateMachine):
    """Owners ask, give back and give up in any order, beside lists of who is due."""

    owners = st.sampled_from(["a", "b", "c", None])

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.places = FairPlaces(1, "pictures")
        self.number = 1
        self.share: Share = all_but_one
        # A task in place of the place that it will get.
        self.held: list[tuple[Owner, Place | asyncio.Task[Place]]] = []
        self.queue: list[tuple[Owner, asyncio.Task[Place]]] = []
        self.turns: list[Owner] = []  # the waiting tasks, in the order of their turns

    @initialize(number=st.integers(1, 6), share=st.sampled_from([all_but_one, as_many_as_are_free]))
    def begin(self, number: int, share: Share) -> None:
        self.number, self.share = number, share
        self.places = FairPlaces(number, "pictures", share)

    def _has(self, owner: Owner) -> int:
        return sum(each == owner for each, _ in self.held)

    def _may(self, owner: Owner) -> bool:
        free = self.number - len(self.held)
        return free > 0 and (owner is None or self._has(owner) < self.share(self.number, free))

    @rule(owner=owners)
    def ask(self, owner: Owner) -> None:
        task = self.loop.create_task(self.places.take(owner))
        self.loop.run_until_complete(settle())
        if self._may(owner):
            assert task.done()
            self.held.append((owner, task.result()))
        else:
            assert not task.done()
            self.queue.append((owner, task))
            if owner not in self.turns:
                self.turns.append(owner)

    @rule(owner=owners)
    def ask_without_waiting(self, owner: Owner) -> None:
        if self._may(owner):
            self.held.append((owner, self.places.take_now(owner)))
        else:
            with pytest.raises(TooManyAtOnce):
                self.places.take_now(owner)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), cancels=st.booleans())
    def give_back(self, data: st.DataObject, cancels: bool) -> None:
        """Give back a place; `cancels` cancels its next holder before it notices."""
        at = data.draw(st.integers(0, len(self.held) - 1))
        _, place = self.held.pop(at)
        self._return(place)
        due = self._due()
        for task in due if cancels else ():
            task.cancel()
        self.loop.run_until_complete(settle())
        if cancels and due:
            assert all(task.cancelled() for task in due)
            self._take_over(self._due_after(due))
        else:
            self._take_over(due)

    def _return(self, place: Place | asyncio.Task[Place]) -> None:
        assert isinstance(place, Place)
        place.give_back()
        place.give_back()

    def _due_after(self, cancelled: list[asyncio.Task[Place]]) -> list[asyncio.Task[Place]]:
        """Return who gets the places that come back one after the other."""
        self.held = [(owner, place) for owner, place in self.held if place not in cancelled]
        return self._due()

    def _due(self) -> list[asyncio.Task[Place]]:
        """Take those whose turn it is out of the queue, with their places held."""
        due: list[asyncio.Task[Place]] = []
        while ready := [owner for owner in self.turns if self._may(owner)]:
            owner = min(ready, key=self._has)
            task = next(task for each, task in self.queue if each == owner)
            self.queue.remove((owner, task))
            self.turns.remove(owner)
            if any(each == owner for each, _ in self.queue):
                self.turns.append(owner)
            self.held.append((owner, task))
            due.append(task)
        return due

    def _take_over(self, due: list[asyncio.Task[Place]]) -> None:
        assert all(task.done() for task in due)
        self.held = [
            (owner, each.result() if isinstance(each, asyncio.Task) else each)
            for owner, each in self.held
        ]

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        owner, task = self.queue.pop(data.draw(st.integers(0, len(self.queue) - 1)))
        if not any(each == owner for each, _ in self.queue):
            self.turns.remove(owner)
        task.cancel()
        self.loop.run_until_complete(settle())
        assert task.cancelled()

    @invariant()
    def agree(self) -> None:
        assert self.places.free == self.number - len(self.held)
        for owner in ("a", "b", "c", None):
            assert self.places.held(owner) == self._has(owner)
            assert self.places.waiting(owner) == sum(each == owner for each, _ in self.queue)
        assert not any(task.done() for _, task in self.queue)

    def teardown(self) -> None:
        while self.queue:
            _, task = self.queue.pop()
            task.cancel()
        self.loop.run_until_complete(settle())
        for _, place in self.held:
            self._return(place)
        assert self.places.free == self.number
        self.loop.close()


TestTurnsModel = TurnsModel.TestCase
