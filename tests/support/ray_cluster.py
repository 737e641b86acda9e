"""A Ray cluster of processes on this machine, parts of which tests can take away.

It has its own ports and folder, and ends only the processes that it started.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from serve_app.local.temporary import free_port
from tests.support.polling import wait_until

ROOT = Path(__file__).parents[2]
DEADLINE_S = 600
LOOK_S = 0.2
# On a busy machine Ray gives up after 15 s on its own agent, or after 30 s on the node.
TRIES = 5
STORE_BYTES = 100_000_000
_TOLD_TO_GO = re.compile(r'"jobs_in_hand": (\d+)')  # in the event worker_drains


@dataclass(frozen=True)
class EngineProcess:
    """A running ComfyUI: its port, and its CUDA_VISIBLE_DEVICES ("all" if unset)."""

    port: int
    gpus: str


@dataclass
class RayCluster:
    """A cluster whose head listens at `host`. Call `close` even if the start failed.

    `environ` is the environment of every process of the cluster.
    """

    folder: Path
    environ: Mapping[str, str]
    host: str = "127.0.0.1"
    gcs_port: int = field(default_factory=free_port)
    first_engine_port: int = field(default_factory=free_port)
    _started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def ray_head(self, *options: str, environ: Mapping[str, str]) -> None:
        """Start a head without CPU and GPU, and return when it runs.

        Raises ChildProcessError with its output if it ends instead.
        """
        head = self.ray_start(
            "head",
            *("--head", f"--port={self.gcs_port}", "--num-cpus=0", "--num-gpus=0"),
            *(f"--temp-dir={self.folder / 'ray'}", "--include-dashboard=false"),
            *(f"--ray-client-server-port={free_port()}", *options),
            f"--redis-password={self.environ['RAY_REDIS_PASSWORD']}",
            environ=environ,
        )
        said = self._log("head").read_text
        wait_until(lambda: head.poll() is not None or "Ray runtime started" in said(), DEADLINE_S)
        if head.poll() is not None:
            raise ChildProcessError(said())

    def ray_start(
        self, name: str, *options: str, environ: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Run `ray start` with these options, and write its output to the log `name`."""
        command = [
            *(program("ray"), "start", "--block", f"--object-store-memory={STORE_BYTES}"),
            *("--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"),
            *options,
        ]
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT)
        self._started[name] = process
        return process

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Deploy as `serve deploy` does, but without Ray's dashboard."""
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(dict(config)))
        address = f"--address={self.host}:{self.gcs_port}"
        done = subprocess.run(
            [program("serve"), "run", "--non-blocking", address, str(path)],
            env=dict(self.environ),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, done.stderr

    def engines(self) -> set[EngineProcess]:
        found = set()
        for process in self.processes():
            with suppress(psutil.Error):
                argv = process.cmdline()
                # Skip its guard, whose command line ends with that of the engine.
                if argv[1:2] == ["-u"] and "--base-directory" in argv:
                    port = int(argv[argv.index("--port") + 1])
                    gpus = process.environ().get("CUDA_VISIBLE_DEVICES", "all")
                    found.add(EngineProcess(port, gpus))
        return found

    def jobs_in_hand_when_told_to_go(self) -> list[int]:
        """Return the number of jobs in hand of each worker when Serve ordered it to stop."""
        return jobs_in_hand_when_told_to_go((self.folder / "ray").glob("session_*/logs/worker-*"))

    def close(self) -> None:
        """End every process of this cluster."""
        for started in self._started.values():
            if started.poll() is None:  # also its workers, which would start other engines
                kill(tree(psutil.Process(started.pid)))
        kill(self.processes())
        for started in self._started.values():
            started.wait()
        wait_until(lambda: not self.processes(), DEADLINE_S)

    def processes(self) -> list[psutil.Process]:
        """Return the running processes that name this folder on their command line."""
        mine = []
        for process in psutil.process_iter():
            try:
                if str(self.folder) in _line(process) and process.environ():
                    mine.append(process)
            except psutil.Error:
                continue
        return mine

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


def jobs_in_hand_when_told_to_go(logs: Iterable[Path]) -> list[int]:
    """Read from workers' logs how many jobs each had in hand when Serve stopped it."""
    told = (_TOLD_TO_GO.findall(log.read_text(errors="replace")) for log in logs)
    return [int(count) for counts in told for count in counts]


def tree(process: psutil.Process) -> list[psutil.Process]:
    """Return the process and all its descendants."""
    return [process, *process.children(recursive=True)]


def kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _line(process: psutil.Process) -> str:
    return " ".join(process.cmdline())
