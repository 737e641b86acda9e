"""/api/v1/workflows: the available workflows."""

from __future__ import annotations

from fastapi import APIRouter

from restoration.errors import (
    DependencyUnavailable,
    Forbidden,
    RestorationError,
    Unauthenticated,
    UnknownWorkflow,
)
from serve_app.asgi.openapi import problems
from serve_app.auth.scopes import Scope
from serve_app.routes.dependencies import ServicesOf, require
from serve_app.schemas.restorations import WorkflowList, WorkflowView
from workflows.catalog import Workflow

router = APIRouter(
    prefix="/api/v1/workflows",
    tags=["workflows"],
    dependencies=[require(Scope.READ)],
    responses=problems(Unauthenticated, Forbidden, DependencyUnavailable, RestorationError),
)


@router.get("")
async def list_workflows(services: ServicesOf) -> WorkflowList:
    """List all workflows, each with a JSON Schema of its parameters."""
    return WorkflowList(workflows=tuple(_view(w) for w in services.catalog))


@router.get("/{name}", responses=problems(UnknownWorkflow, malformed_request=422))
async def get_workflow(name: str, services: ServicesOf) -> WorkflowView:
    """Return one workflow, with a JSON Schema of its parameters."""
    return _view(services.catalog.find(name))


def _view(workflow: Workflow) -> WorkflowView:
    return WorkflowView(
        name=workflow.name,
        version=workflow.version,
        title=workflow.manifest.title,
        description=workflow.manifest.description,
        parameters=workflow.parameters_schema(),
    )
