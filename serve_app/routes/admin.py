"""/api/v1/admin: what the workers do and what waits, and orders to workers; for operators."""

from __future__ import annotations

from fastapi import APIRouter

from restoration.errors import (
    DependencyUnavailable,
    Forbidden,
    RestorationError,
    Unauthenticated,
    WorkerNotFound,
)
from serve_app.asgi.openapi import problems
from serve_app.auth.scopes import Scope
from serve_app.routes.dependencies import ServicesOf, require
from serve_app.schemas.workers import QueueView, WorkerList, WorkerView

router = APIRouter(
    prefix="/api/v1/admin",
    tags=["admin"],
    dependencies=[require(Scope.ADMIN)],
    responses=problems(Unauthenticated, Forbidden, DependencyUnavailable, RestorationError),
)
_ORDER = problems(WorkerNotFound, malformed_request=422)


@router.get("/workers")
async def list_workers(services: ServicesOf) -> WorkerList:
    """Every worker: its node, its engine, what it has in hand, and whether it is drained."""
    return WorkerList.of(await services.workers.roll())


@router.get("/queue")
async def get_queue(services: ServicesOf) -> QueueView:
    """How many jobs wait and run, of each class, and since when the oldest waits."""
    return QueueView.of(await services.workers.queue())


@router.post("/workers/{worker}/drain", responses=_ORDER)
async def drain_worker(worker: str, services: ServicesOf) -> WorkerView:
    """It finishes what it has in hand and claims nothing more, until it is undrained."""
    return WorkerView.of(await services.workers.drain(worker, drained=True))


@router.post("/workers/{worker}/undrain", responses=_ORDER)
async def undrain_worker(worker: str, services: ServicesOf) -> WorkerView:
    """It claims jobs again."""
    return WorkerView.of(await services.workers.drain(worker, drained=False))


@router.post("/workers/{worker}/restart-engine", responses=_ORDER)
async def restart_engine(worker: str, services: ServicesOf) -> WorkerView:
    """Its ComfyUI is started anew as soon as no job is in it; jobs wait for it meanwhile."""
    return WorkerView.of(await services.workers.restart_engine(worker))
