"""All faults that chaos can cause, with one function for each kind.

A fault returns a description of its victim, or None if there was no victim, and raises OSError if
it failed. It always resumes the processes that it stops for a while.
"""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from tests.chaos.connections import drop_connections
from tests.chaos.processes import Part, StackProcesses
from tests.support.stack_processes import Process, engines, tree

ENGINE_GONE_S = 120.0  # The guard gives the engine of a dead owner 5 s to end by itself.
# Shortest and longest stop, in leases of 4 s: a lease lapses, but Serve's health check (30 s) does
# not. After the shortest one the worker brings its attempt's result while the next attempt runs.
WORKER_STOPPED_LEASES = (1.125, 2.0)
ENGINE_STOPPED_S = (6.0, 6.0)
# Longer than clients wait for a connection, shorter than the supervisor waits for an answer.
SERVICE_STOPPED_S = (8.0, 8.0)


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault that happened, at `at` seconds since the epoch."""

    kind: str
    at: float
    detail: str


Hit = Callable[[StackProcesses, random.Random], str | None]


@dataclass(frozen=True, slots=True)
class Fault:
    kind: str
    hit: Hit


def _pick(stack: StackProcesses, part: Part, rng: random.Random) -> Process | None:
    found = stack.find(part)
    return rng.choice(found) if found else None


def kill(part: Part, stack: StackProcesses, rng: random.Random) -> str | None:
    victim = _pick(stack, part, rng)
    return f"pid {victim.pid}" if victim and victim.send(signal.SIGKILL) else None


def kill_worker(stack: StackProcesses, rng: random.Random) -> str | None:
    """Kill a worker, and report after how many seconds its engine ended by itself."""
    victim = _pick(stack, Part.GPU_WORKER, rng)
    engine = stack.engine_of(victim) if victim else None
    if victim is None or not victim.send(signal.SIGKILL):
        return None
    if engine is None:
        return f"pid {victim.pid}, which had no engine yet"
    port, process = engine
    gone_s = _seconds_to_end(process)
    outcome = "STILL RUNS" if gone_s is None else f"was gone after {gone_s:.1f} s"
    return f"pid {victim.pid}; its engine on port {port} {outcome}"


def _seconds_to_end(process: Process) -> float | None:
    began = time.monotonic()
    pause = threading.Event()
    while process.is_alive():
        if time.monotonic() - began > ENGINE_GONE_S:
            return None
        pause.wait(0.05)
    return time.monotonic() - began


def stop_for_a_while(
    part: Part, between_s: tuple[float, float], stack: StackProcesses, rng: random.Random
) -> str | None:
    """Stop a process and its descendants, and resume them after a random time within
    `between_s`."""
    victim = _pick(stack, part, rng)
    if victim is None:
        return None
    duration_s = rng.uniform(*between_s)
    stopped = [each for each in tree(victim.pid) if each.send(signal.SIGSTOP)]
    try:
        threading.Event().wait(duration_s)
    finally:
        for each in stopped:
            each.send(signal.SIGCONT)
    return f"pid {victim.pid}, for {duration_s:.1f} s" if stopped else None


def stop_worker(stack: StackProcesses, rng: random.Random) -> str | None:
    """Stop a worker for longer than its lease."""
    shortest, longest = (leases * stack.lease_s for leases in WORKER_STOPPED_LEASES)
    return stop_for_a_while(Part.GPU_WORKER, (shortest, longest), stack, rng)


def hang(stack: StackProcesses, rng: random.Random) -> str | None:
    """Stop a ComfyUI for good: it is alive and silent until its owner ends it."""
    victim = _pick(stack, Part.COMFYUI, rng)
    return f"pid {victim.pid}" if victim and victim.send(signal.SIGSTOP) else None


def drop_engine_connections(stack: StackProcesses, rng: random.Random) -> str | None:
    """Drop the websocket and all HTTP connections between one ComfyUI and its worker."""
    found = list(engines(stack.state_dir).items())
    if not found:
        return None
    port, engine = rng.choice(found)
    dropped = drop_connections(engine, port)
    return f"{dropped} of the engine on port {port}" if dropped else None


def lose_valkey(stack: StackProcesses, rng: random.Random) -> str | None:
    """Kill Valkey and delete all the data that it has written."""
    shutil.rmtree(stack.state_dir / "redis" / "appendonlydir", ignore_errors=True)
    return kill(Part.VALKEY, stack, rng)


_KILLED = (
    Part.COMFYUI,
    Part.DISPATCHER,
    Part.INGRESS,
    Part.CONTROLLER,
    Part.PROXY,
    Part.STATUS_ACTOR,
    Part.MAINTENANCE,
    Part.IMAGE_PROCESS,
    Part.POSTGRES,
    Part.VALKEY,
    Part.SEAWEEDFS,
)

FAULTS: tuple[Fault, ...] = (
    Fault("GPU worker killed", kill_worker),
    *(Fault(f"{part} killed", partial(kill, part)) for part in _KILLED),
    Fault("GPU worker stopped", stop_worker),
    Fault("ComfyUI stopped", partial(stop_for_a_while, Part.COMFYUI, ENGINE_STOPPED_S)),
    Fault("ComfyUI hung for good", hang),
    *(
        Fault(f"{part} stopped", partial(stop_for_a_while, part, SERVICE_STOPPED_S))
        for part in (Part.POSTGRES, Part.VALKEY, Part.SEAWEEDFS)
    ),
    Fault("engine's connections dropped", drop_engine_connections),
    Fault("Valkey killed, data deleted", lose_valkey),
)
BY_KIND = {fault.kind: fault for fault in FAULTS}


def shuffled(rng: random.Random) -> Iterator[Fault]:
    """Yield faults endlessly in random order, each kind once before any comes again."""
    while True:
        yield from rng.sample(FAULTS, len(FAULTS))


def strike(fault: Fault, stack: StackProcesses, rng: random.Random) -> Strike | None:
    """Strike once; return None if there was no victim. Raises OSError if the fault failed."""
    began = time.time()
    detail = fault.hit(stack, rng)
    return None if detail is None else Strike(fault.kind, began, detail)
