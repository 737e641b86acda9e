"""What routes ask for: the services, who calls, and that the caller may.

A route names what it needs by the type of its caller: `Reader`, `Writer`, or
`Annotated[Principal, require(...)]`; the OpenAPI document then shows the scope.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

from fastapi import Depends, Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from restoration.errors import Forbidden, Unauthenticated
from serve_app.auth import Principal
from serve_app.scopes import Scope
from serve_app.services import Services

_bearer = HTTPBearer(
    scheme_name="bearer",
    bearerFormat="JWT",
    description="An RS256 access token of the configured issuer. Jobs belong to its `sub`; "
    "each operation names the scope that it needs, in `scope` or `permissions`.",
    auto_error=False,
)


def services_of(request: Request) -> Services:
    return cast("Services", request.app.state.services)


async def authenticated(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Principal:
    """Who calls, asked once however many want to know. Raises Unauthenticated,
    DependencyUnavailable."""
    if credentials is None:
        raise Unauthenticated("send a bearer token in the Authorization header")
    known: Principal | None = getattr(request.state, "caller", None)
    if known is None:
        authenticator = services_of(request).authenticator
        known = request.state.caller = await authenticator.authenticate(credentials.credentials)
    return known


async def _authorized(
    needed: SecurityScopes, caller: Annotated[Principal, Depends(authenticated)]
) -> Principal:
    for scope in needed.scopes:
        if scope not in caller.scopes:
            raise Forbidden(f"the token lacks the scope {scope}", scope=scope)
    return caller


def require(scope: Scope) -> Any:
    """A dependency: the caller, who has `scope`. Raises Unauthenticated, Forbidden."""
    return Security(_authorized, scopes=[scope.value])


ServicesOf = Annotated[Services, Depends(services_of)]
Reader = Annotated[Principal, require(Scope.READ)]
Writer = Annotated[Principal, require(Scope.WRITE)]


async def _listed_owner(
    caller: Reader,
    owner: Annotated[
        str | None, Query(description="whose; other owners' are listed for `admin` only")
    ] = None,
) -> str:
    if owner is None or caller.reach in (None, owner):
        return owner or caller.sub
    raise Forbidden(f"to list what others own takes the scope {Scope.ADMIN}", scope=Scope.ADMIN)


ListedOwner = Annotated[str, Depends(_listed_owner)]


def whose(owner: str, caller: Principal) -> dict[str, str]:
    """The query of the next page of a listing of what `owner` owns."""
    return {} if owner == caller.sub else {"owner": owner}
