"""/api/v1/workflows: what can be asked for."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from restoration.errors import (
    DependencyUnavailable,
    RestorationError,
    Unauthenticated,
    UnknownWorkflow,
)
from serve_app.openapi import problems
from serve_app.routes.dependencies import ServicesOf, authenticated
from serve_app.schemas import WorkflowList, WorkflowView
from workflows.catalog import Workflow

router = APIRouter(
    prefix="/api/v1/workflows",
    tags=["workflows"],
    dependencies=[Depends(authenticated)],
    responses=problems(Unauthenticated, DependencyUnavailable, RestorationError),
)


@router.get("")
async def list_workflows(services: ServicesOf) -> WorkflowList:
    """Every workflow, with a JSON Schema of its parameters."""
    return WorkflowList(workflows=tuple(_view(w) for w in services.catalog))


@router.get("/{name}", responses=problems(UnknownWorkflow, malformed_request=422))
async def get_workflow(name: str, services: ServicesOf) -> WorkflowView:
    """One workflow, with a JSON Schema of its parameters."""
    return _view(services.catalog.find(name))


def _view(workflow: Workflow) -> WorkflowView:
    return WorkflowView(
        name=workflow.name,
        version=workflow.version,
        title=workflow.manifest.title,
        description=workflow.manifest.description,
        parameters=workflow.parameters_schema(),
    )
