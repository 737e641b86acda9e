"""/docs: the API's reference for people. /openapi.json is the same for programs."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from serve_app.web.reference import POLICY, render

router = APIRouter(include_in_schema=False)
_STYLE = files("serve_app.web").joinpath("reference.css").read_bytes()


@router.get("/docs")
async def show_reference(request: Request) -> HTMLResponse:
    return HTMLResponse(render(request.app.openapi()), headers={"Content-Security-Policy": POLICY})


@router.get("/docs/reference.css")
async def get_reference_style() -> Response:
    return Response(_STYLE, media_type="text/css")
