"""What routes ask for: the services, and who calls."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from restoration.errors import Unauthenticated
from serve_app.auth import Principal
from serve_app.services import Services

_bearer = HTTPBearer(
    scheme_name="bearer",
    bearerFormat="JWT",
    description="An RS256 access token of the configured issuer. Jobs belong to its `sub`.",
    auto_error=False,
)


def services_of(request: Request) -> Services:
    return cast("Services", request.app.state.services)


async def authenticated(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Principal:
    """Raises Unauthenticated, DependencyUnavailable."""
    if credentials is None:
        raise Unauthenticated("send a bearer token in the Authorization header")
    return await services_of(request).authenticator.authenticate(credentials.credentials)


ServicesOf = Annotated[Services, Depends(services_of)]
Caller = Annotated[Principal, Depends(authenticated)]
