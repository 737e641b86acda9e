"""A cluster on Ray's own fake cloud: the real autoscaler, whose nodes are processes here.

Ray's `AutoscalingCluster` stops every Ray on the machine. This is one head on ports and in a
folder of its own, and it ends what it started and nothing else.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from tests.stack import free_port

ROOT = Path(__file__).parents[1]
DEADLINE_S = 240
LOOK_S = 0.2
_FIRST_PORT = "FAKE_CLOUD_FIRST_PORT"
_PORTS_PER_NODE = 10
_STORE_BYTES = 100_000_000
_NOTHING: dict[str, list[str]] = {
    f"{part}_commands": []
    for part in (
        *("initialization", "setup", "head_setup", "worker_setup"),
        *("head_start_ray", "worker_start_ray"),
    )
}


class Provider(FakeMultiNodeProvider):
    """Gives each node ports of its own, as separate machines would have; runs in the head."""

    def _create_node_with_resources_and_labels(self, *args: Any) -> None:
        port = int(os.environ[_FIRST_PORT]) + _PORTS_PER_NODE * self._next_node_id
        os.environ["ENGINE_BASE_PORT"] = str(port)  # for the processes of the node that starts now
        super()._create_node_with_resources_and_labels(*args)  # type: ignore[no-untyped-call]


def wait_for(condition: Callable[[], object]) -> None:
    """Return when `condition` holds. Raises TimeoutError after DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {DEADLINE_S} s: {condition}")
        time.sleep(LOOK_S)


@dataclass(frozen=True)
class EngineProcess:
    """A ComfyUI, as its own process says."""

    port: int
    gpus: str


@dataclass
class FakeCloud:
    """A head without GPU and up to `max_nodes` nodes of two GPUs each; close it in any case.

    `environ` is what every process of the cluster finds in its environment.
    """

    folder: Path
    environ: Mapping[str, str]
    max_nodes: int
    gcs_port: int = field(default_factory=free_port)
    first_engine_port: int = field(default_factory=free_port)
    _head: subprocess.Popen[bytes] | None = None

    def start_head(self) -> None:
        """Start the head; returns when it can be reached."""
        config = self.folder / "cluster.json"
        config.write_text(json.dumps(self._config()))
        command = [
            *(_program("ray"), "start", "--head", "--block", f"--port={self.gcs_port}"),
            *("--num-cpus=0", "--num-gpus=0", f"--object-store-memory={_STORE_BYTES}"),
            *(f"--temp-dir={self.folder / 'ray'}", f"--autoscaling-config={config}"),
            *(f"--ray-client-server-port={free_port()}", "--dashboard-agent-listen-port=0"),
            *("--include-dashboard=false", "--min-worker-port=0", "--max-worker-port=0"),
            f"--redis-password={self.environ['RAY_REDIS_PASSWORD']}",
        ]
        with (self.folder / "head.log").open("ab") as log:
            self._head = subprocess.Popen(
                command, env=self._head_environ(), stdout=log, stderr=subprocess.STDOUT
            )
        wait_for(lambda: _listens(self.gcs_port))

    def deploy(self, config: Mapping[str, Any]) -> None:
        """As `serve deploy` does, without Ray's dashboard in between."""
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(dict(config)))
        address = f"--address=127.0.0.1:{self.gcs_port}"
        done = subprocess.run(
            [_program("serve"), "run", "--non-blocking", address, str(path)],
            env=dict(self.environ),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, done.stderr

    def nodes(self) -> dict[int, psutil.Process]:
        """The raylet of each node but the head, by the number in the node's id."""
        raylets: dict[str, psutil.Process] = {}
        for process in self._processes():
            with suppress(psutil.Error):
                if process.name() == "raylet":
                    raylets[process.environ()["RAY_CLOUD_INSTANCE_ID"]] = process
        return {int(node[-5:]): raylets[node] for node in raylets if node != FAKE_HEAD_NODE_ID}

    def lose_node(self, number: int) -> None:
        """SIGKILL to all that Ray runs there; engines notice that their owners are gone."""
        raylet = self.nodes()[number]
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def engines(self) -> set[EngineProcess]:
        found = set()
        for process in self._processes():
            with suppress(psutil.Error):
                argv = process.cmdline()
                # not its guard, which has the engine's command line behind its own
                if argv[1:2] == ["-u"] and "--base-directory" in argv:
                    port = int(argv[argv.index("--port") + 1])
                    gpus = process.environ().get("CUDA_VISIBLE_DEVICES", "all")
                    found.add(EngineProcess(port, gpus))
        return found

    def place(self, port: int) -> tuple[int, int]:
        """The node, by the number in its id, and the slot there of an engine's port."""
        node, slot = divmod(port - self.first_engine_port, _PORTS_PER_NODE)
        return node + 1, slot

    def close(self) -> None:
        """End every process of this cluster."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self._head is not None:
            self._head.wait()
        wait_for(lambda: not self._processes())

    def _processes(self) -> list[psutil.Process]:
        """Those that are still there and name this folder on their command line."""
        mine = []
        for process in psutil.process_iter():
            try:
                if str(self.folder) in _line(process) and process.environ():
                    mine.append(process)
            except psutil.Error:
                continue
        return mine

    def _head_environ(self) -> dict[str, str]:
        return dict(self.environ) | {
            _FIRST_PORT: str(self.first_engine_port),
            "PYTHONPATH": str(ROOT),  # for the provider in this file
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
                    "resources": {"CPU": 4, "GPU": 2, "object_store_memory": _STORE_BYTES},
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


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _line(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
