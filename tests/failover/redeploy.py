"""`python -m tests.failover.redeploy`: deploy over the service that runs at RAY_ADDRESS.

Like `serve deploy` of another release, it replaces every replica.
"""

from __future__ import annotations

import ray
from ray import serve

from actors.cluster.handles import APP
from actors.cluster.local import find_ray
from actors.status_actor import NAMESPACE
from serve_app.deployment import PoolArgs, build

ray.init(address=find_ray("auto"), namespace=NAMESPACE, log_to_driver=False)
args = PoolArgs(
    workers_min=2,
    workers_max=2,
    worker_gpus=0,
    worker_cpus=0,
    ingress_replicas=1,
    drain_s=29,  # Another number makes another version of the workers.
)
serve.run(build(args), name=APP, route_prefix="/", external_scaler_enabled=True)
