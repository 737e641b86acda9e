"""A head and a GPU node, started by `ray start`; the head can be killed and started again.

Each has its own loopback address, like two machines on a network. Ray then listens on every
interface, protected by its token: it does not treat a Ray kept on loopback as a cluster.
"""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass, field

import psutil
import structlog

from tests.support.polling import wait_until
from tests.support.ray_cluster import DEADLINE_S, TRIES, RayCluster, kill, tree

HEAD = "127.0.0.2"
NODE = "127.0.0.3"
GPUS = 2
NEVER_GIVEN = range(20_000, 30_000)  # Linux assigns ephemeral ports from 32768 on.

log = structlog.get_logger(__name__)


def _port_to_come_back_to() -> int:
    """Return a free port that the system will not assign to another process while the head is
    down."""
    for port in secrets.SystemRandom().sample(NEVER_GIVEN, len(NEVER_GIVEN)):
        with suppress(OSError), socket.socket() as probe:
            probe.bind((HEAD, port))
            return port
    raise OSError("no port is free")


@dataclass
class TwoNodes(RayCluster):
    """A head without GPU, and a node with two GPUs."""

    host: str = HEAD
    gcs_port: int = field(default_factory=_port_to_come_back_to)

    def start_head(self) -> None:
        """Start the head, or start it again with another node id, and return when it runs."""
        for left in reversed(range(TRIES)):
            try:
                return self._start_head()
            except ChildProcessError:
                # Retry as KubeRay or an operator does.
                log.warning("head_did_not_start", tries_left=left)
                if not left:
                    raise

    def _start_head(self) -> None:
        # A killed head leaves this file, and Ray would take the node's raylet on this machine for
        # that head. `ray stop` removes it, and a new machine does not have it.
        (self.folder / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        self.ray_head(f"--node-ip-address={HEAD}", environ=self.environ)

    def start_node(self) -> None:
        self.ray_start(
            "node",
            *(f"--address={HEAD}:{self.gcs_port}", f"--node-ip-address={NODE}"),
            *("--num-cpus=4", f"--num-gpus={GPUS}", f"--temp-dir={self.folder / 'node'}"),
            environ={
                **self.environ,
                "ENGINE_BASE_PORT": str(self.first_engine_port),
                "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # as in cluster.yaml
            },
        )

    def kill_head(self) -> None:
        """Kill all processes of the head: Ray's control plane, Serve's, and this product's
        replicas."""
        processes = tree(psutil.Process(self._started["head"].pid))
        kill(processes)
        self._started["head"].wait()
        wait_until(lambda: not any(_lives(process) for process in processes), DEADLINE_S)

    def on_head(self, title: str) -> set[psutil.Process]:
        """Return the head's processes whose Ray title begins with `title`."""
        return self._titled("head", title)

    def on_node(self, title: str) -> set[psutil.Process]:
        """Return the node's processes whose Ray title begins with `title`."""
        return self._titled("node", title)

    def _titled(self, name: str, title: str) -> set[psutil.Process]:
        found = set()
        for process in tree(psutil.Process(self._started[name].pid)):
            with suppress(psutil.Error):
                if process.cmdline()[0].startswith(title):
                    found.add(process)
        return found


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
