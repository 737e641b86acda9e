"""A local stack that loses its Ray: detection, effects and messages, without a Ray."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, Self

import pytest
from ray.exceptions import RayActorError

from persistence.embedded.state import StateDir
from restoration.errors import DependencyUnavailable, SetupError
from restoration.settings import NodeSettings
from serve_app.cli import shared
from serve_app.cli.doctor import _stack
from serve_app.local import ray, stack
from serve_app.local.ray import Watch
from serve_app.local.ray_process import RayLost
from serve_app.local.record import (
    RayReport,
    StackOptions,
    StackRecord,
    demand_down,
    recording,
)
from serve_app.local.temporary import free_port

DEADLINE_S = 300
LOST = "its raylet ended with status -9"


class Loss:
    """The reasons of the loss that a watch reported."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.happened = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.happened.set()


class World:
    """Ray as a watch sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dead: list[tuple[str, Any]] = []
        self.controller: Callable[[], object] = lambda: None
        alive = SimpleNamespace(check_alive=SimpleNamespace(remote=lambda: None))
        fake_ray = SimpleNamespace(get_actor=lambda *_: alive, get=lambda _: self.controller())
        monkeypatch.setattr(ray, "ray", fake_ray)
        monkeypatch.setattr(ray, "own_node", lambda: self)
        monkeypatch.setattr(ray, "_LOOK_S", 0.005)
        monkeypatch.setattr(ray, "_ASK_S", 0.005)

    def dead_processes(self) -> list[tuple[str, Any]]:
        return self.dead


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def loss() -> Loss:
    return Loss()


@pytest.fixture
def watch(listener: socket.socket, loss: Loss, world: World) -> Iterator[Watch]:
    watch = Watch(listener.getsockname()[1], loss)
    yield watch
    end(watch)


def end(watch: Watch) -> None:
    """Stop the watch and wait for its threads, which must not see another test's world."""
    watch.stop()
    for thread in threading.enumerate():
        if thread.name in (Watch._ask.__name__, Watch._watch_processes.__name__):
            thread.join(DEADLINE_S)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("raylet", LOST), ("gcs_server", "its control plane (GCS) ended with status -9")],
)
def test_a_vital_process_that_ended_is_a_loss(
    watch: Watch, world: World, loss: Loss, kind: str, reason: str
) -> None:
    """It is noticed at once, whether or not the service is up by then."""
    watch.start()
    world.dead = [("monitor", SimpleNamespace(returncode=1))]
    assert not loss.happened.wait(0.1)
    world.dead.append((kind, SimpleNamespace(returncode=-9)))
    assert loss.happened.wait(DEADLINE_S)
    assert set(loss.reasons) == {reason}


def test_a_controller_that_is_gone_is_a_loss(
    watch: Watch, world: World, loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts once the service has been up, and not while Ray restarts the controller."""

    def restarting() -> None:
        raise RayActorError

    def gone() -> None:
        raise ValueError("no such actor")

    world.controller = gone
    watch.start()
    assert not loss.happened.wait(0.1)
    world.controller = restarting
    watch.expect_answers()
    assert not loss.happened.wait(0.1)
    world.controller = gone
    assert loss.happened.wait(DEADLINE_S)
    assert set(loss.reasons) == {"Serve's controller has ended"}


def test_silence_is_a_loss(loss: Loss, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """This applies to a proxy whose port stays closed and a controller that does not respond."""
    monkeypatch.setattr(ray, "_SILENT_LOOKS", 5)
    watch = Watch(free_port(), loss)
    watch.start()
    watch.expect_answers()
    assert loss.happened.wait(DEADLINE_S)
    end(watch)
    assert loss.reasons[0].startswith("the HTTP proxy has not responded for")


def test_a_controller_that_never_answers_is_a_loss(
    watch: Watch, world: World, loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that asks it is stuck, but the one that counts is not."""
    monkeypatch.setattr(ray, "_SILENT_LOOKS", 5)
    answer = threading.Event()
    world.controller = lambda: answer.wait(DEADLINE_S)
    watch.start()
    watch.expect_answers()
    assert loss.happened.wait(DEADLINE_S)
    answer.set()
    assert loss.reasons[0].startswith("Serve's controller has not responded for")


class FakeRay:
    """Lives that end as configured: before they are ready, or after."""

    lives: list[bool]

    def __init__(self, *_: object) -> None:
        self.gets_ready = FakeRay.lives.pop(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_until_ready(self, _answers: object) -> RayReport:
        if not self.gets_ready:
            raise RayLost("Ray did not start")
        return RayReport("/no/session", "127.0.0.1:1", "http://127.0.0.1:2/metrics", ready=True)

    def wait_until_lost(self) -> NoReturn:
        if not FakeRay.lives:
            raise KeyboardInterrupt
        raise RayLost(LOST)


@pytest.fixture
def records() -> list[StackRecord]:
    return []


def serve(lives: list[bool], tmp_path: Path, records: list[StackRecord]) -> list[str]:
    """Return the output of `restore up` until it is interrupted in the last of these lives."""
    FakeRay.lives = lives
    said: list[str] = []
    node = NodeSettings(state_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stack._serve(
            node,
            StackOptions(),
            None,
            said.append,
            lambda record: said.append(f"serves at {record.url}"),
            records.append,
        )
    return said


def test_a_ray_that_is_lost_is_started_again(
    tmp_path: Path, records: list[StackRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other commands see that it is lost, and when it is back."""
    monkeypatch.setattr(stack, "RayProcess", FakeRay)
    said = serve([True, False, True], tmp_path, records)
    assert [line.partition(",")[0] for line in said] == [
        "starting Ray and the service",
        "serves at http://127.0.0.1:8000",
        f"Ray was lost: {LOST}",
        "starting Ray and the service",
        "Ray was lost: Ray did not start",
        "starting Ray and the service",
        "serves at http://127.0.0.1:8000",
        "stopping",
    ]
    assert [record.lost for record in records] == [None, LOST, "Ray did not start", None]
    assert records[-1].pid == os.getpid()


def test_a_stack_is_not_found_before_it_has_served(
    tmp_path: Path, records: list[StackRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if its first tries fail, `restore up --detach` waits for one that serves."""
    monkeypatch.setattr(stack, "RayProcess", FakeRay)
    serve([False, False, True], tmp_path, records)
    assert [record.lost for record in records] == [None]


def test_a_ray_that_is_lost_again_and_again_ends_the_stack(
    tmp_path: Path, records: list[StackRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line is printed; a Ray that has lived for a while does not count in the row."""
    monkeypatch.setattr(stack, "RayProcess", FakeRay)
    monkeypatch.setattr(stack, "STEADY_S", -1.0)
    serve([True] * 20, tmp_path, records)
    monkeypatch.setattr(stack, "STEADY_S", 3600.0)
    with pytest.raises(DependencyUnavailable, match=r"lost 6 times in a row, .*continues with all"):
        serve([True] * 20, tmp_path, records)
    assert len(FakeRay.lives) == 14


def test_a_stack_that_has_lost_its_ray_says_so_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client command, the doctor and a second `restore up` each print one line."""
    monkeypatch.setenv("COMFY_RESTORE_STATE", str(tmp_path))
    node = NodeSettings(state_dir=tmp_path)
    with StateDir.locked(tmp_path, lambda _port: True):
        with pytest.raises(SetupError, match="is starting or stopping"):
            shared.local_stack()
        with recording(tmp_path) as record:
            record(StackRecord(os.getpid(), "http://127.0.0.1:1", lost=LOST))
            with pytest.raises(SetupError, match=f"lost its Ray .{LOST}. and is restarting it"):
                shared.local_stack()
            with pytest.raises(SetupError, match=f"already running .* restarting its Ray .{LOST}"):
                demand_down(tmp_path)
            finding = _stack(node)
            assert (finding.ok, LOST in finding.detail) == (False, True)
            record(StackRecord(os.getpid(), f"http://127.0.0.1:{free_port()}"))
            finding = _stack(node)
            assert not finding.ok
            assert "does not respond" in finding.detail
    with pytest.raises(SetupError, match="no local stack is running"):
        shared.local_stack()
