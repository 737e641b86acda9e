"""Detect that Serve drains this replica, so that a worker can release its jobs in time.

Serve waits for a replica's requests and kills it at the shutdown timeout. User code gets no
notice before its destructor, which does not run after a kill.
"""

from __future__ import annotations

from ray._private.worker import global_worker


def is_draining() -> bool:
    """Return whether Serve has begun to stop the replica that runs this code.

    Serve has no public API for it. This reads the private flag that `perform_graceful_shutdown` of
    Ray 2.60 sets first, one reason why the version of Ray is pinned.
    """
    [replica] = global_worker.actors.values()
    draining: bool = replica._replica_impl._shutting_down
    return draining
