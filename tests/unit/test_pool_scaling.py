"""The leading dispatcher scales the pool: on fakes, without Ray."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from actors.cluster.handles import APP, WORKERS, ServePool
from actors.leader.autoscaler import PoolScaler, keep_target
from restoration.errors import DependencyUnavailable
from restoration.jobs import Priority
from restoration.scaling import Scaler, ScalingPolicy
from tests.fakes.job_store import MemoryJobStore
from tests.support.polling import until
from tests.support.samples import artifact, new_job

DEADLINE_S = 300


@dataclass
class Pool:
    """Serve's part: the current size, and the sizes requested so far."""

    workers: int = 0
    told: list[int] = field(default_factory=list)
    failures: int = 0
    defects: int = 0

    async def size(self) -> int:
        if self.defects:
            self.defects -= 1
            raise AttributeError("size")
        if self.failures:
            self.failures -= 1
            raise DependencyUnavailable("Serve's controller does not respond: gone")
        return self.workers

    async def resize(self, workers: int) -> None:
        self.workers = workers
        self.told.append(workers)


@dataclass
class Bench:
    jobs: MemoryJobStore = field(default_factory=MemoryJobStore)
    pool: Pool = field(default_factory=Pool)
    now_s: float = 0.0

    serve: ServePool | None = None

    def scaler(self, warm_workers: int = 0, upscale_delay_s: float = 2) -> PoolScaler:
        policy = ScalingPolicy(1, 0, 4, warm_workers, upscale_delay_s, downscale_delay_s=60)
        pool = self.serve or self.pool
        return PoolScaler(self.jobs, pool, Scaler(policy), lambda: self.now_s)


@pytest.mark.scaling
async def test_the_pool_goes_from_zero_to_all_and_back() -> None:
    """A burst is one request for every worker; all leave after the delay once all jobs ended."""
    bench = Bench()
    scaler = bench.scaler()
    await bench.jobs.insert(new_job())
    await scaler.look()
    for _ in range(9):
        await bench.jobs.insert(new_job(priority=Priority.BATCH))
    bench.now_s = 2
    await scaler.look()
    assert bench.pool.told == [4]

    while job := await bench.jobs.claim("w", 600, ["restore"]):
        bench.now_s += 1
        await scaler.look()
        await bench.jobs.succeed(job.ref, artifact(), {})
    assert bench.pool.told == [4]

    await scaler.look()
    bench.now_s += 60
    await scaler.look()
    assert bench.pool.told[-1] < 4
    for _ in range(2):
        bench.now_s += 60
        await scaler.look()
    assert bench.pool.workers == 0


@pytest.mark.scaling
async def test_jobs_in_hand_keep_their_workers() -> None:
    """However long a job takes, as many workers are kept as jobs are in hand."""
    bench = Bench(pool=Pool(workers=4))
    scaler = bench.scaler()
    for _ in range(2):
        await bench.jobs.insert(new_job())
        await bench.jobs.claim("w", 6000, ["restore"])

    for _ in range(5):
        await scaler.look()
        bench.now_s += 100

    assert bench.pool.workers == 2


@pytest.mark.scaling
async def test_warm_workers_come_without_a_job() -> None:
    """Workers kept for the next interactive job are requested in an empty service."""
    bench = Bench()
    scaler = bench.scaler(warm_workers=1)

    await scaler.look()
    bench.now_s = 2
    await scaler.look()

    assert bench.pool.told == [1]


@pytest.mark.scaling
async def test_a_controller_that_is_away_is_asked_again() -> None:
    """A restart of Serve's controller, an absent Postgres or a defect does not end the scaling."""
    bench = Bench(pool=Pool(failures=3, defects=2))
    await bench.jobs.insert(new_job())
    task = asyncio.create_task(bench.scaler(upscale_delay_s=0).run(pause_s=0.001))

    await until(lambda: bench.pool.told == [1])

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class Controller:
    """Serve's controller, which answers `answers` one after the other; None waits for `asked`."""

    def __init__(self, *answers: object) -> None:
        self._answers = iter(answers)
        self.asked: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    @property
    def get_serve_instance_details(self) -> Controller:
        return self

    async def remote(self) -> object:
        if (answer := next(self._answers)) is not None:
            return answer
        return await self.asked


@pytest.mark.scaling
async def test_while_the_application_is_built_its_size_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Serve then reports no deployment, as after a deployment that failed."""
    controller = Controller({"applications": {}}, {"applications": {APP: {"deployments": {}}}})
    monkeypatch.setattr("ray.get_actor", lambda *_: controller)
    for _ in range(2):
        with pytest.raises(DependencyUnavailable):
            await ServePool().size()


@pytest.mark.scaling
async def test_a_scaler_that_is_stopped_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds even in the moment in which the controller answers."""
    workers = {"target_num_replicas": 1}
    controller = Controller(None)
    monkeypatch.setattr("ray.get_actor", lambda *_: controller)
    task = asyncio.create_task(Bench(serve=ServePool()).scaler().run(pause_s=60))
    await asyncio.sleep(0.1)
    controller.asked.set_result({"applications": {APP: {"deployments": {WORKERS: workers}}}})
    await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=DEADLINE_S)
    task.cancel()
    assert done


@pytest.mark.scaling
def test_serve_keeps_to_the_number_that_was_set() -> None:
    """Serve's own policy changes nothing, however many tickets are in flight."""
    context = SimpleNamespace(target_num_replicas=3, total_num_requests=99, current_num_replicas=1)

    assert keep_target(context) == (3, {})
