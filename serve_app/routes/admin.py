"""/api/v1/admin: the state of workers and queue, and orders to workers, for operators."""

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
    """List all workers, each with its node, its engine, its jobs and whether it is drained."""
    return WorkerList.of(await services.workers.roll())


@router.get("/queue")
async def get_queue(services: ServicesOf) -> QueueView:
    """Count waiting and running jobs by priority, with the time of the oldest waiting job."""
    return QueueView.model_validate(await services.workers.queue())


@router.post("/workers/{worker}/drain", responses=_ORDER)
async def drain_worker(worker: str, services: ServicesOf) -> WorkerView:
    """Let a worker finish its jobs and claim no more until it is undrained."""
    return WorkerView.of(await services.workers.drain(worker, drained=True))


@router.post("/workers/{worker}/undrain", responses=_ORDER)
async def undrain_worker(worker: str, services: ServicesOf) -> WorkerView:
    """Let a drained worker claim jobs again."""
    return WorkerView.of(await services.workers.drain(worker, drained=False))


@router.post("/workers/{worker}/restart-engine", responses=_ORDER)
async def restart_engine(worker: str, services: ServicesOf) -> WorkerView:
    """Restart a worker's ComfyUI as soon as no job runs in it. Jobs wait for it meanwhile."""
    return WorkerView.of(await services.workers.restart_engine(worker))
