"""The fair queue: interactive before batch jobs, and owners in turns within a class.

`turns` has a row for each owner and class, ordered by the time of the owner's last turn. A claim
takes the oldest job of the first owner. Triggers on `jobs` count the waiting jobs and stamp each
turn in the same transaction, so that a claim is one statement that uses two indexes.

Lock order of a transaction that changes several jobs: lock all their rows first, then change them
in the order of `by_turn`. Each change to or from `queued` locks the owner's turn, and each start
and end locks the owner's row (`persistence.postgres.owner_counters`) before that.

The statements are built once, because building one takes longer than executing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BindParameter,
    ColumnElement,
    Connection,
    Integer,
    Interval,
    ScalarSelect,
    Select,
    Subquery,
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

from persistence.postgres.tables import OWNED, jobs, owners, turns
from restoration.affinity import WINDOW_JOBS, WINDOW_TURNS, Candidate
from restoration.jobs import AttemptRef, Job, JobStatus, Priority, sources_of
from restoration.queue_policy import versioned
from restoration.scaling import Demand

# A worker that handed a job back with a failure cannot claim it until this long after the job's
# back-off, so that others can.
ELSEWHERE_S = 2.0
# The turn of a job that lost its worker is dated back by this much, to come before all others.
_FIRST = timedelta(days=365)
# An owner whose last turn is longer ago counts as if it was this long ago. The triggers'
# migration has the same figure.
AWAY_S = 600.0

_IS_WAITING = jobs.c.status.in_(sources_of(JobStatus.RUNNING))
_IS_UNSTARTED = and_(jobs.c.status == JobStatus.QUEUED, jobs.c.attempt == 0)
_MAY_START_AGAIN = and_(
    jobs.c.status == JobStatus.QUEUED, jobs.c.attempt > 0, jobs.c.available_at <= func.now()
)
_KEY = tuple_(turns.c.owner, turns.c.priority)
_INTERACTIVE = literal(Priority.INTERACTIVE, turns.c.counts_as.type)
_SOMETHING_WAITS = turns.c.counts_as.is_not(None)
_HAS_ITS_TURN = and_(_SOMETHING_WAITS, ~turns.c.held)


def _first_turns(limit: ScalarSelect[int] | int) -> Subquery:
    """Return the first `limit` turns, in order.

    A limit makes Postgres sort the turns before a join; sorting after it would lock one job of each
    owner.
    """
    query = select(turns).where(_HAS_ITS_TURN).order_by(turns.c.counts_as, turns.c.turn_at)
    return query.limit(limit).subquery("turn")


# The limit is a subquery, so that the planner does not know it takes all rows, and reads the index
# instead of sorting all turns.
_TURNS = _first_turns(select(literal(2**31)).scalar_subquery())
_NEXT_TURNS = _first_turns(WINDOW_TURNS)


def by_turn(job: Job) -> tuple[str, bool]:
    """Return the sort key of the order in which a transaction must change jobs."""
    return job.owner, job.options.priority is Priority.BATCH


def is_overdue() -> ColumnElement[bool]:
    """Return the condition that a job never started and its queue deadline has passed."""
    return and_(_IS_UNSTARTED, jobs.c.queue_deadline_at <= func.now())


def _claimable(turn: Subquery) -> Select[tuple[UUID, int]]:
    """Return the query for the jobs of `turn` that may start now, oldest first."""
    may_start = or_(jobs.c.attempt > 0, jobs.c.queue_deadline_at > func.now())
    # Ordered by submission, so that a job that lost its worker keeps its place.
    return (
        select(jobs.c.id, jobs.c.attempt)
        .where(jobs.c.owner == turn.c.owner, jobs.c.priority == turn.c.priority)
        .where(_IS_WAITING, jobs.c.available_at <= func.now(), may_start)
        .order_by(jobs.c.created_at, jobs.c.id)
    )


def _in_turn(head: LateralFromClause) -> Select[tuple[UUID, int]]:
    return (
        select(head.c.id, head.c.attempt)
        .select_from(_TURNS.join(head, true()))
        .order_by(_TURNS.c.counts_as, _TURNS.c.turn_at)
    )


_AT_MOST = bindparam("at_most", type_=Integer())
_LIST_WAITING = _in_turn(_claimable(_TURNS).limit(_AT_MOST).lateral("head")).limit(_AT_MOST)


def waiting(limit: int, connection: Connection) -> list[AttemptRef]:
    """Return up to `limit` jobs: those of the first owner, then of the next (see LeaderQueue)."""
    rows = connection.execute(_LIST_WAITING, {"at_most": limit})
    return [AttemptRef(row.id, row.attempt + 1) for row in rows]


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


def demand(connection: Connection) -> Demand:
    """Return the demand (see LeaderQueue), with waiting jobs from the counts that triggers keep."""
    could_start = {row.priority: int(row.jobs) for row in connection.execute(_COULD_START)}
    in_hand = {row.priority: int(row.jobs) for row in connection.execute(_IN_HAND)}
    return Demand(
        waiting=sum(could_start.values()),
        running=sum(in_hand.values()),
        interactive_waiting=could_start.get(Priority.INTERACTIVE, 0),
        interactive_running=in_hand.get(Priority.INTERACTIVE, 0),
    )


# The statements of a claim by `for_worker`, which runs `of_workflows`.
_WORKFLOWS: BindParameter[str] = bindparam("of_workflows", expanding=True)
_SEPARATOR = versioned("", "")  # between the name and the version of a workflow
_RUNS_HERE = or_(
    jobs.c.workflow.in_(_WORKFLOWS),
    (jobs.c.workflow + _SEPARATOR + jobs.c.workflow_version).in_(_WORKFLOWS),
)
# `is_not(True)`, because the comparison is NULL for a job without a last worker.
_NOT_JUST_FAILED_HERE = and_(
    jobs.c.last_worker == bindparam("for_worker"),
    jobs.c.available_at > func.now() - timedelta(seconds=ELSEWHERE_S),
).is_not(True)

_BEST = (
    _claimable(_TURNS)
    .where(_RUNS_HERE, _NOT_JUST_FAILED_HERE)
    .limit(1)
    .with_for_update(skip_locked=True)
    .lateral("head")
)
# Locks the next job to claim for a worker, and returns its id.
BEST = _in_turn(_BEST).with_only_columns(_BEST.c.id).limit(1).scalar_subquery()

_ORDER = bindparam("order", type_=ARRAY(Uuid))
# Locks the first job of `order` that still waits, and returns its id.
FIRST = (
    select(jobs.c.id)
    .where(jobs.c.id == func.any(_ORDER), _IS_WAITING)
    .order_by(func.array_position(_ORDER, jobs.c.id))
    .limit(1)
    .with_for_update(skip_locked=True)
    .scalar_subquery()
)

_OLDEST = (
    _claimable(_NEXT_TURNS)
    .add_columns(jobs.c.workflow)
    .where(_RUNS_HERE, _NOT_JUST_FAILED_HERE)
    .limit(WINDOW_JOBS)
    .add_columns(jobs.c.created_at)
    .lateral("head")
)
_WINDOW = (
    select(_OLDEST.c.id, _OLDEST.c.workflow, _NEXT_TURNS.c.counts_as)
    .select_from(_NEXT_TURNS.join(_OLDEST, true()))
    .order_by(_NEXT_TURNS.c.counts_as, _NEXT_TURNS.c.turn_at, _OLDEST.c.created_at, _OLDEST.c.id)
)


def candidates(worker: str, workflows: Sequence[str], connection: Connection) -> list[Candidate]:
    """Return the oldest jobs of the next few turns, in queue order, without locking them.

    All are of the same class as the first.
    """
    values = {"for_worker": worker, "of_workflows": list(workflows)}
    rows = connection.execute(_WINDOW, values).all()
    return [Candidate(row.id, row.workflow) for row in rows if row.counts_as == rows[0].counts_as]


def give_next_turn(job: Job, connection: Connection) -> None:
    """Give its owner the next turn for `job`, which lost its worker after it had its turn."""
    of_turn = and_(turns.c.owner == job.owner, turns.c.priority == job.options.priority)
    values = {"counts_as": _INTERACTIVE, "turn_at": func.clock_timestamp() - _FIRST}
    connection.execute(update(turns).where(of_turn).values(values))


def _unlocked(*conditions: ColumnElement[bool]) -> Select[tuple[str, Priority]]:
    """Return the query for keys of turns, skipping those locked by a claim or insert."""
    keys = select(turns.c.owner, turns.c.priority).where(*conditions)
    return keys.with_for_update(skip_locked=True)


_OF_TURN = and_(jobs.c.owner == turns.c.owner, jobs.c.priority == turns.c.priority)
_IS_OLD = jobs.c.created_at <= func.now() - bindparam("aging", type_=Interval())
_CLASS_NOW = case(
    (select(jobs.c.id).where(_IS_WAITING, _OF_TURN, _IS_OLD).exists(), _INTERACTIVE),
    (select(jobs.c.id).where(_MAY_START_AGAIN, _OF_TURN).exists(), _INTERACTIVE),
    else_=turns.c.priority,
)
_CHANGED = _unlocked(_SOMETHING_WAITS, turns.c.counts_as != _CLASS_NOW)
_PROMOTE = update(turns).where(_KEY.in_(_CHANGED)).values(counts_as=_CLASS_NOW)
_AWAY = turns.c.turn_at < func.now() - timedelta(seconds=AWAY_S)
_FORGET_AWAY = delete(turns).where(_KEY.in_(_unlocked(~_SOMETHING_WAITS, _AWAY)))


def promote(aging_s: float, connection: Connection) -> None:
    """Update the class that each turn counts as, and delete old idle turns.

    A turn counts as interactive if its oldest waiting job is older than `aging_s`, or if one of its
    jobs has been started and may start again now: not while that job waits for its `available_at`,
    because the rank would go to the other jobs of the turn.
    """
    connection.execute(_PROMOTE, {"aging": timedelta(seconds=aging_s)})
    connection.execute(_FORGET_AWAY)
