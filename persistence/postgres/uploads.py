"""UploadStore on Postgres: direct uploads without a job yet, and their announced sizes.

Triggers (see the migration) add them to the owner's stored bytes before the client gets its link.
The transaction that records an upload's job deletes its row; retention deletes the unused ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects.postgresql import insert

from persistence.objects.keys import upload_key
from persistence.postgres import queue_room
from persistence.postgres.database import Database
from persistence.postgres.owner_counters import lock_owners
from persistence.postgres.tables import uploads
from restoration.limits.quotas import Quotas
from restoration.queue_policy import QueuePolicy


class PostgresUploadStore:
    """UploadStore without state of its own; any number of stores may share a database."""

    def __init__(self, database: Database, policy: QueuePolicy | None = None) -> None:
        self._database = database
        self._policy = policy or QueuePolicy()

    async def begin(
        self,
        upload_id: UUID,
        owner: str,
        size_bytes: int,
        lifetime_s: float,
        quotas: Quotas | None = None,
    ) -> None:
        def work(connection: Connection) -> None:
            # The insert locks the owner's row, so the checks after it are exact for one owner.
            statement = insert(uploads).values(
                id=upload_id,
                owner=owner,
                size_bytes=size_bytes,
                expires_at=func.now() + timedelta(seconds=lifetime_s),
            )
            connection.execute(statement.on_conflict_do_nothing())  # a repeated call
            queue_room.check_room(self._policy, owner, quotas, 0, connection)
            of_owner = select(func.sum(uploads.c.size_bytes)).where(uploads.c.owner == owner)
            announced = int(connection.scalar(of_owner) or 0)
            (quotas or self._policy.quotas).check_uploading(announced)

        await self._database.run(work)

    async def size_of(self, upload_id: UUID, owner: str) -> int | None:
        query = select(uploads.c.size_bytes).where(
            uploads.c.id == upload_id, uploads.c.owner == owner
        )
        return await self._database.run(lambda connection: connection.scalar(query), atomic=False)


def end_upload(upload_id: UUID, connection: Connection) -> None:
    """Delete an upload whose job was recorded. The caller has locked the owner's row."""
    connection.execute(delete(uploads).where(uploads.c.id == upload_id))


def expire_uploads(limit: int, connection: Connection) -> Sequence[str]:
    """Delete expired uploads, and return the keys of their objects for deletion."""
    chosen = (
        select(uploads.c.id, uploads.c.owner)
        .where(uploads.c.expires_at <= func.now())
        .order_by(uploads.c.expires_at)
        .limit(limit)
    )
    found = connection.execute(chosen).all()
    lock_owners({row.owner for row in found}, connection)
    ids = [row.id for row in found]
    gone = delete(uploads).where(uploads.c.id.in_(ids)).returning(uploads.c.id, uploads.c.owner)
    return [upload_key(row.owner, row.id) for row in connection.execute(gone)]
