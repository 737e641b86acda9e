"""Whether Serve has told this replica to stop.

Serve waits for a replica's requests and kills it when its time is up; user code hears of neither
before its destructor, which a kill leaves out. A worker that knows hands its jobs back in time.
"""

from __future__ import annotations

from ray._private.worker import global_worker


def is_draining() -> bool:
    """For code of a Serve replica.

    Serve has no public word for it: this is the flag that `perform_graceful_shutdown` of Ray 2.60
    sets first, and the reason why no other version of Ray is allowed.
    """
    [replica] = global_worker.actors.values()
    draining: bool = replica._replica_impl._shutting_down
    return draining
