"""Ray and the service of a local stack, in a process that can be abandoned.

`restore up` starts it as `python -m serve_app.local.ray --workers N --port PORT --report FILE`, and
ends it in order with SIGTERM. Calls to a Ray that has lost its raylet or its control plane (GCS)
block for minutes or for ever, and no signal interrupts them. So two threads watch Ray. The first to
find it lost ends the process at once, with one line that gives the reason; Ray's own processes end
with it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from persistence.embedded.state import write_private
from persistence.embedded.supervisor import exit_on_sigterm
from restoration.errors import DependencyUnavailable
from restoration.settings import NodeSettings, load_node_settings
from serve_app.deployment import PoolArgs, own_node, start_ray, start_service, stop_service
from serve_app.local.record import FAILED_STATUS, LOST_STATUS, RayReport

# No request can be answered without these two.
_VITAL = {"raylet": "raylet", "gcs_server": "control plane (GCS)"}
_LOOK_S = 0.5
_ASK_S = 5.0
# Serve replaces a controller or a proxy within seconds; on an overloaded machine, within a minute.
# The limit counts polls, since this process may itself be stopped for a while.
_SILENT_LOOKS = 240


class Watch:
    """Watches a Ray that this process has started, and calls `lose` with the reason if it is lost.

    It needs two threads, because the calls to Ray of one may never return.
    """

    def __init__(self, port: int, lose: Callable[[str], None]) -> None:
        self._port = port
        self._lose = lose
        self._over = threading.Event()
        self._serving = threading.Event()
        self._silent = {"Serve's controller": 0, "the HTTP proxy": 0}

    def start(self) -> None:
        for target in (self._watch_processes, self._ask):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def expect_answers(self) -> None:
        """From now on, also treat a service that does not respond as lost."""
        self._serving.set()

    def stop(self) -> None:
        self._over.set()
        self._serving.set()  # wakes the thread that waits for it

    def _watch_processes(self) -> None:
        while not self._over.wait(_LOOK_S):
            for kind, process in own_node().dead_processes():
                if kind in _VITAL:
                    self._lose(f"its {_VITAL[kind]} ended with status {process.returncode}")
            if not self._serving.is_set():
                continue
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port), timeout=_LOOK_S).close()
                self._silent["the HTTP proxy"] = 0
            for part in self._silent:
                self._silent[part] += 1
                if self._silent[part] > _SILENT_LOOKS:
                    self._lose(f"{part} has not responded for {_SILENT_LOOKS * _LOOK_S:.0f} s")

    def _ask(self) -> None:
        self._serving.wait()
        while not self._over.wait(_ASK_S):
            try:
                controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
                ray.get(controller.check_alive.remote())
                self._silent["Serve's controller"] = 0
            except ValueError:
                self._lose("Serve's controller has ended")
            except RayError:  # it is being restarted
                continue


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    watch = Watch(options.port, _end_at_once)
    with exit_on_sigterm(), ExitStack() as stops:
        stops.callback(ray.shutdown)
        stops.callback(watch.stop)
        stops.callback(stop_service)
        try:
            report = start_ray()
        except DependencyUnavailable as error:
            _say(str(error))
            sys.exit(LOST_STATUS)
        _write(options.report, report)
        watch.start()
        try:
            start_service(_sizes(load_node_settings(os.environ), options.workers), options.port)
        except DependencyUnavailable as error:
            _say(str(error))
            sys.exit(FAILED_STATUS)
        except RayError as error:
            _say(f"Ray was lost while the service started: {error!r}")
            sys.exit(LOST_STATUS)
        watch.expect_answers()
        _write(options.report, replace(report, ready=True))
        threading.Event().wait()


def _sizes(node: NodeSettings, workers: int) -> PoolArgs:
    return PoolArgs(
        workers_min=workers,
        workers_max=workers,
        worker_gpus=0 if node.engine_variant == "cpu" or node.comfyui_url else 1,
        worker_depth=node.worker_depth,
        worker_cpus=0,  # the owner of this machine decides how many engines it can run
        ingress_replicas=1,
        dispatcher_replicas=2,  # a lost one is replaced in seconds, but jobs would wait meanwhile
        drain_s=node.drain_s,
    )


def _write(path: Path, report: RayReport) -> None:
    write_private(path, json.dumps(asdict(report)))


def _end_at_once(reason: str) -> None:
    _say(reason)
    os._exit(LOST_STATUS)


def _say(reason: str) -> None:
    """Write the one line that `restore up` reads."""
    sys.stderr.write(f"error: {' '.join(reason.split())}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
