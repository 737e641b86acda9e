"""Whose turn it is: interactive before batch, and within a class one owner after the other.

`turns` has a row for each owner and class, ordered by when that owner had its last turn; a claim
takes the first owner's oldest job. Triggers on `jobs` count what waits and stamp each turn, in
the same transaction, so that a claim is one statement and finds its job through two indexes.

Lock order, for a transaction that changes several jobs: lock all of them first, then change them
in the order of `by_turn`, because each change to or from `queued` locks its owner's turn, and
each start and end its owner's row (`persistence.postgres.owner_counters`) before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BindParameter,
    ColumnElement,
    Connection,
    Delete,
    Interval,
    ScalarSelect,
    Select,
    Subquery,
    Update,
    Uuid,
    and_,
    bindparam,
    case,
    delete,
    func,
    literal,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.sql.selectable import LateralFromClause

from persistence.postgres.owner_counters import limit_running
from persistence.postgres.tables import OWNED, jobs, owners, turns
from restoration.affinity import WINDOW_JOBS, WINDOW_TURNS, Candidate
from restoration.jobs import AttemptRef, Job, JobStatus, Priority, sources_of
from restoration.limits.quotas import Quotas
from restoration.queue_policy import Load, QueuePolicy, versioned
from restoration.scaling import Demand

# A job that a worker has handed back for a failure is kept from it for so long, for others.
ELSEWHERE_S = 2.0
# The turn of a job that lost its worker is dated back by so much: before all other turns.
_FIRST = timedelta(days=365)
# An owner without a turn for longer is treated as if it had had one then. The migration that
# makes the triggers has the same figure.
AWAY_S = 600.0

_WAITS = jobs.c.status.in_(sources_of(JobStatus.RUNNING))
_UNSTARTED = and_(jobs.c.status == JobStatus.QUEUED, jobs.c.attempt == 0)
_STARTS_AGAIN = and_(jobs.c.status == JobStatus.QUEUED, jobs.c.attempt > 0)
_KEY = tuple_(turns.c.owner, turns.c.priority)
_INTERACTIVE = literal(Priority.INTERACTIVE, turns.c.counts_as.type)
_SOMETHING_WAITS = turns.c.counts_as.is_not(None)
_HAS_ITS_TURN = and_(_SOMETHING_WAITS, ~turns.c.held)
# The limit makes Postgres order the turns before the join; ordered after it, a claim would lock one
# job of each owner. It is itself a query, so that the planner cannot tell that it takes them all,
# and goes through the index instead of sorting turns that nobody will look at.
_ALL = select(literal(2**31)).scalar_subquery()
_TURN = (
    select(turns)
    .where(_HAS_ITS_TURN)
    .order_by(turns.c.counts_as, turns.c.turn_at)
    .limit(_ALL)
    .subquery("turn")
)


def by_turn(job: Job) -> tuple[str, bool]:
    """The order in which a transaction must change jobs."""
    return job.owner, job.priority is Priority.BATCH


def is_overdue() -> ColumnElement[bool]:
    """Never started, and its queue deadline has passed."""
    return and_(_UNSTARTED, jobs.c.queue_deadline_at <= func.now())


def waiting(limit: int, connection: Connection) -> list[AttemptRef]:
    """As the port says: up to `limit` jobs of the first owner, then of the next."""
    rows = connection.execute(_waiting(limit))
    return [AttemptRef(row.id, row.attempt + 1) for row in rows]


@cache
def _waiting(limit: int) -> Select[tuple[UUID, int]]:
    """Made once for each limit, of which there are few."""
    return _in_turn(_TURN, _claimable(_TURN).limit(limit).lateral("head")).limit(limit)


def demand(connection: Connection) -> Demand:
    """As the port says; from the counts that the triggers keep, not from the queue itself."""
    waiting = {row.priority: int(row.jobs) for row in connection.execute(_COULD_START)}
    running = {row.priority: int(row.jobs) for row in connection.execute(_IN_HAND)}
    return Demand(
        waiting=sum(waiting.values()),
        running=sum(running.values()),
        interactive_waiting=waiting.get(Priority.INTERACTIVE, 0),
        interactive_running=running.get(Priority.INTERACTIVE, 0),
    )


_ROOM = case((owners.c.max_running > 0, owners.c.max_running - owners.c.running))
_COULD_START = (
    select(turns.c.priority, func.sum(func.least(turns.c.waiting, _ROOM)).label("jobs"))
    .join(owners, owners.c.owner == turns.c.owner)
    .where(_HAS_ITS_TURN)
    .group_by(turns.c.priority)
)
_IN_HAND = (
    select(jobs.c.priority, func.count().label("jobs"))
    .where(jobs.c.status.in_(OWNED))
    .group_by(jobs.c.priority)
)


def _claimable(turn: Subquery) -> Select[tuple[UUID, int]]:
    """The jobs of a `turn` that may start now, oldest first."""
    may_start = or_(jobs.c.attempt > 0, jobs.c.queue_deadline_at > func.now())
    # Age counts from the submission: a job that lost its worker keeps its place in the line.
    return (
        select(jobs.c.id, jobs.c.attempt)
        .where(jobs.c.owner == turn.c.owner, jobs.c.priority == turn.c.priority)
        .where(_WAITS, jobs.c.available_at <= func.now(), may_start)
        .order_by(jobs.c.created_at, jobs.c.id)
    )


def _in_turn(turn: Subquery, head: LateralFromClause) -> Select[tuple[UUID, int]]:
    return (
        select(head.c.id, head.c.attempt)
        .select_from(turn.join(head, true()))
        .order_by(turn.c.counts_as, turn.c.turn_at)
    )


def _mine() -> ColumnElement[bool]:
    """Whether `for_worker`, which knows `of_workflows`, may have a job."""
    just_failed_here = and_(
        jobs.c.last_worker == bindparam("for_worker"),
        jobs.c.available_at > func.now() - timedelta(seconds=ELSEWHERE_S),
    )
    known: BindParameter[str] = bindparam("of_workflows", expanding=True)
    version = jobs.c.workflow + versioned("", "") + jobs.c.workflow_version
    able = or_(jobs.c.workflow.in_(known), version.in_(known))
    return and_(able, just_failed_here.is_not(True))


def _best() -> ScalarSelect[UUID]:
    head = _claimable(_TURN).where(_mine()).limit(1)
    locked = head.with_for_update(skip_locked=True).lateral("head")
    return _in_turn(_TURN, locked).with_only_columns(locked.c.id).limit(1).scalar_subquery()


# The id of the job that the worker is to have, its row locked.
BEST = _best()


def _window() -> Select[Any]:
    turn = (
        select(turns)
        .where(_HAS_ITS_TURN)
        .order_by(turns.c.counts_as, turns.c.turn_at)
        .limit(WINDOW_TURNS)
        .subquery("turn")
    )
    head = _claimable(turn).add_columns(jobs.c.workflow).where(_mine()).limit(WINDOW_JOBS)
    line = head.add_columns(jobs.c.created_at).lateral("head")
    return (
        select(line.c.id, line.c.workflow, turn.c.counts_as)
        .select_from(turn.join(line, true()))
        .order_by(turn.c.counts_as, turn.c.turn_at, line.c.created_at, line.c.id)
    )


_WINDOW = _window()


def candidates(worker: str, workflows: Sequence[str], connection: Connection) -> list[Candidate]:
    """The oldest jobs of the next few turns, all of the best one's class; no row is locked."""
    values = {"for_worker": worker, "of_workflows": list(workflows)}
    rows = connection.execute(_WINDOW, values).all()
    return [Candidate(row.id, row.workflow) for row in rows if row.counts_as == rows[0].counts_as]


def _first() -> ScalarSelect[UUID]:
    order = bindparam("order", type_=ARRAY(Uuid))
    return (
        select(jobs.c.id)
        .where(jobs.c.id == func.any(order), _WAITS)
        .order_by(func.array_position(order, jobs.c.id))
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )


# The id of the first job of `order` that still waits, its row locked.
FIRST = _first()


def check_room(
    policy: QueuePolicy, owner: str, quotas: Quotas | None, more_bytes: int, connection: Connection
) -> None:
    """Raise QueueFull or StorageFull unless one more job of `owner`, with so many bytes, has room
    beside those there are."""
    load, _ = _load(owner, connection)
    more = Load(load.waiting + 1, load.waiting_of_owner + 1, load.stored_bytes + more_bytes)
    policy.check_room(more, quotas)


def admit(
    policy: QueuePolicy,
    owner: str,
    quotas: Quotas | None,
    running_limit: int | None,
    connection: Connection,
) -> None:
    """Raise QueueFull or StorageFull unless there is room for the jobs of `owner` that this
    transaction has inserted; from now on so many of its jobs may run, None: as many as before.

    Exact for one owner, whose row the insert has locked; in all, inserts of several owners that
    commit at the same moment may go over by their number.
    """
    load, max_running = _load(owner, connection)
    policy.check_room(load, quotas)
    if running_limit is not None and running_limit != max_running:
        limit_running(owner, running_limit, connection)


def _load(owner: str, connection: Connection) -> tuple[Load, int]:
    """What there is, and how many of the owner's jobs may run at a time."""
    row = connection.execute(_LOAD, {"of_owner": owner}).one()
    return Load(row.in_all, row.of_owner, row.stored_bytes or 0), row.max_running or 0


def _load_of() -> Select[Any]:
    owner: BindParameter[str] = bindparam("of_owner")
    in_all = func.coalesce(func.sum(turns.c.waiting), 0)
    of_owner = func.coalesce(func.sum(turns.c.waiting).filter(turns.c.owner == owner), 0)
    waiting = select(in_all.label("in_all"), of_owner.label("of_owner")).where(_SOMETHING_WAITS)
    counts = waiting.subquery("counts")
    return select(counts, owners.c.stored_bytes, owners.c.max_running).select_from(
        counts.outerjoin(owners, owners.c.owner == owner)
    )


_LOAD = _load_of()


def put_first(job: Job, connection: Connection) -> None:
    """Give `job`, which lost its worker and waits again, the next turn: it has had its own once."""
    of_turn = and_(turns.c.owner == job.owner, turns.c.priority == job.priority)
    values = {"counts_as": _INTERACTIVE, "turn_at": func.clock_timestamp() - _FIRST}
    connection.execute(update(turns).where(of_turn).values(values))


def promote(aging_s: float, connection: Connection) -> None:
    """Let each turn count as what its jobs make it, and forget old idle ones.

    The oldest that waits, by its age; and any that was started once and is to start again.
    """
    connection.execute(_PROMOTE, {"aging": timedelta(seconds=aging_s)})
    connection.execute(_FORGET_AWAY)


def _unlocked(*conditions: ColumnElement[bool]) -> Select[tuple[str, Priority]]:
    """Keys of turns that no claim or insert is changing at this moment: never waits for one."""
    keys = select(turns.c.owner, turns.c.priority).where(*conditions)
    return keys.with_for_update(skip_locked=True)


def _promotion() -> Update:
    oldest = jobs.c.created_at <= func.now() - bindparam("aging", type_=Interval())
    of_turn = and_(jobs.c.owner == turns.c.owner, jobs.c.priority == turns.c.priority)
    counts_as = case(
        (select(jobs.c.id).where(_WAITS, of_turn, oldest).exists(), _INTERACTIVE),
        (select(jobs.c.id).where(_STARTS_AGAIN, of_turn).exists(), _INTERACTIVE),
        else_=turns.c.priority,
    )
    changed = _unlocked(_SOMETHING_WAITS, turns.c.counts_as != counts_as)
    return update(turns).where(_KEY.in_(changed)).values(counts_as=counts_as)


def _forgetting() -> Delete:
    away = turns.c.turn_at < func.now() - timedelta(seconds=AWAY_S)
    return delete(turns).where(_KEY.in_(_unlocked(~_SOMETHING_WAITS, away)))


# Made once: the leader executes them every second.
_PROMOTE, _FORGET_AWAY = _promotion(), _forgetting()
