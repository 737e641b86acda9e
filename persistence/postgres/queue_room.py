"""Room for more jobs: the limits on waiting jobs and stored bytes.

The counts are those that triggers keep in `turns` and `owners`, so that a check reads no jobs.
"""

from __future__ import annotations

from sqlalchemy import BindParameter, Connection, bindparam, func, select, update

from persistence.postgres.tables import owners, turns
from restoration.limits.quotas import Quotas
from restoration.queue_policy import Load, QueuePolicy

_OWNER: BindParameter[str] = bindparam("of_owner")
_IN_ALL = func.coalesce(func.sum(turns.c.waiting), 0)
_OF_OWNER = func.coalesce(func.sum(turns.c.waiting).filter(turns.c.owner == _OWNER), 0)
_TOTALS = (
    select(_IN_ALL.label("in_all"), _OF_OWNER.label("of_owner"))
    .where(turns.c.counts_as.is_not(None))
    .subquery("totals")
)
_LOAD = select(_TOTALS, owners.c.stored_bytes, owners.c.max_running).select_from(
    _TOTALS.outerjoin(owners, owners.c.owner == _OWNER)
)


def check_room(
    policy: QueuePolicy, owner: str, quotas: Quotas | None, more_bytes: int, connection: Connection
) -> None:
    """Raise QueueFull or StorageFull unless `owner` may add one job and `more_bytes`."""
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
    """Check that there is room for the jobs that this transaction has inserted for `owner`.

    Also sets the owner's limit on running jobs; None keeps it. Raises QueueFull or StorageFull.

    The check is exact for one owner, whose row the insert has locked. Inserts of several owners
    that commit at the same time may exceed the limit over all owners by their number.
    """
    load, max_running = _load(owner, connection)
    policy.check_room(load, quotas)
    if running_limit is not None and running_limit != max_running:
        statement = update(owners).where(owners.c.owner == owner)
        connection.execute(statement.values(max_running=running_limit))


def _load(owner: str, connection: Connection) -> tuple[Load, int]:
    """Return the current load, and the owner's limit on running jobs."""
    row = connection.execute(_LOAD, {"of_owner": owner}).one()
    return Load(row.in_all, row.of_owner, row.stored_bytes or 0), row.max_running or 0
