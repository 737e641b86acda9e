"""A cluster on Ray's fake cloud: the real autoscaler, with processes of this machine as nodes.

Ray's own `AutoscalingCluster` is not used because it stops every Ray on the machine.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from tests.support.ray_cluster import ROOT, STORE_BYTES, TRIES, RayCluster, kill, tree

_FIRST_PORT = "FAKE_CLOUD_FIRST_PORT"
_PORTS_PER_NODE = 10
_NOTHING: dict[str, list[str]] = {
    f"{part}_commands": []
    for part in (
        *("initialization", "setup", "head_setup", "worker_setup"),
        *("head_start_ray", "worker_start_ray"),
    )
}


class Provider(FakeMultiNodeProvider):
    """Node provider, run in the head, that gives each node its own ports, like a separate
    machine."""

    def _create_node_with_resources_and_labels(self, *args: Any) -> None:
        port = int(os.environ[_FIRST_PORT]) + _PORTS_PER_NODE * self._next_node_id
        os.environ["ENGINE_BASE_PORT"] = str(port)  # for the node that starts now
        super()._create_node_with_resources_and_labels(*args)  # type: ignore[no-untyped-call]


@dataclass
class FakeCloud(RayCluster):
    """A head without GPU, and up to `max_nodes` nodes with two GPUs each."""

    max_nodes: int = 2

    def start_head(self) -> None:
        """Start the head, and return when it can be reached."""
        config = self.folder / "cluster.json"
        config.write_text(json.dumps(self._config()))
        for left in reversed(range(TRIES)):
            # The head's node id is fixed, and Ray never revives a node id that it has marked dead.
            environ = self._head_environ() | {"RAY_external_storage_namespace": f"cloud-{left}"}
            try:
                return self.ray_head(f"--autoscaling-config={config}", environ=environ)
            except ChildProcessError:
                if not left:
                    raise
                self.close()

    def nodes(self) -> dict[int, psutil.Process]:
        """Return the raylet of each node except the head, by the number in the node's id."""
        raylets: dict[str, psutil.Process] = {}
        for process in self.processes():
            with suppress(psutil.Error):
                if process.name() == "raylet":
                    raylets[process.environ()["RAY_CLOUD_INSTANCE_ID"]] = process
        return {int(node[-5:]): raylets[node] for node in raylets if node != FAKE_HEAD_NODE_ID}

    def lose_node(self, number: int) -> None:
        """Kill every Ray process of the node; its engines end because their owners are gone."""
        kill(tree(self.nodes()[number]))

    def place(self, port: int) -> tuple[int, int]:
        """Return the node number and the slot on that node for an engine's port."""
        node, slot = divmod(port - self.first_engine_port, _PORTS_PER_NODE)
        return node + 1, slot

    def _head_environ(self) -> dict[str, str]:
        return dict(self.environ) | {
            _FIRST_PORT: str(self.first_engine_port),
            "PYTHONPATH": str(ROOT),  # to import the provider in this file
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }

    def _config(self) -> dict[str, object]:
        return {
            "cluster_name": "fake",
            "max_workers": self.max_nodes,
            "upscaling_speed": self.max_nodes,
            "idle_timeout_minutes": 0.05,
            "provider": {
                "type": "external",
                "module": f"{Provider.__module__}.{Provider.__name__}",
                "gcs_address": f"127.0.0.1:{self.gcs_port}",
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "available_node_types": {
                FAKE_HEAD_NODE_TYPE: {
                    "resources": {"CPU": 0},
                    "node_config": {},
                    "max_workers": 0,
                },
                "gpu": {
                    "resources": {"CPU": 4, "GPU": 2, "object_store_memory": STORE_BYTES},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": self.max_nodes,
                },
            },
            "head_node_type": FAKE_HEAD_NODE_TYPE,
            "auth": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            **_NOTHING,
        }
