"""The process of the batch script: start it, record its output, and end it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Self
from uuid import UUID

from restoration.jobs import JobStatus
from tests.chaos.batch_script import OWNER
from tests.chaos.ledger import Ledger, Sample
from tests.support.stack import Stack

CONNECT_TIMEOUT_S = 600.0


class BatchProcess:
    """Runs the batch script. The constructor returns when it is connected; `__exit__` kills it."""

    def __init__(self, stack: Stack, ledger: Ledger, samples: Sequence[Sample]) -> None:
        self._ledger = ledger
        log_path = stack.state_dir / "batch-script.log"
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.chaos.batch_script"),
                    stack.record.ray_address,
                    *(str(sample.path) for sample in samples),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "RAY_AUTH_MODE": "token"},  # as Ray does for local clusters
                text=True,
            )
        self._heard = threading.Event()
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()
        if not self._heard.wait(CONNECT_TIMEOUT_S) or self._process.poll() is not None:
            self.__exit__()
            raise ChildProcessError(f"the batch script: {log_path.read_text()[-2000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        self._listener.join()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def submit_no_more(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def finish(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds until the script has watched its jobs to their end."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._ledger.has_trouble("batch script: did not end in time")
            return
        if self._process.returncode != 0:
            self._ledger.has_trouble("batch script: ended with an error")

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            for line in self._process.stdout:
                if line.startswith('{"did"'):
                    self._note(json.loads(line))
        self._heard.set()

    def _note(self, said: dict[str, str]) -> None:
        match said["did"]:
            case "connected":
                self._heard.set()
            case "submit":
                self._ledger.submits()
            case "accepted":
                self._ledger.accepts(UUID(said["id"]), OWNER, said["photo"])
            case "saw":
                self._ledger.sees_end(UUID(said["id"]), JobStatus(said["status"]))
            case "trouble":
                self._ledger.has_trouble(said["what"])
