"""Dependencies of the routes: the services, the caller, and the caller's permissions.

A route states the scope it needs by the type of its caller: `Reader`, `Writer`, or
`Annotated[Principal, require(...)]`. The OpenAPI document then shows the scope.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, cast
from urllib.parse import urlencode

import structlog
from fastapi import Depends, Query, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from restoration.errors import (
    DependencyUnavailable,
    Forbidden,
    RateLimited,
    RestorationError,
    Unauthenticated,
)
from restoration.limits.fair_places import current_owner
from serve_app.asgi.openapi import problems
from serve_app.auth.scopes import Scope
from serve_app.auth.tokens import Principal
from serve_app.services import Services

log = structlog.get_logger(__name__)

# The OpenAPI responses of all routes that take parameters.
COMMON_PROBLEMS = problems(
    Unauthenticated, Forbidden, DependencyUnavailable, RestorationError, malformed_request=422
)

# Requests that change nothing are never rate limited: a polling client must learn how its job
# ended.
_UNCOUNTED = frozenset({"GET", "HEAD"})

_bearer = HTTPBearer(
    scheme_name="bearer",
    bearerFormat="JWT",
    description="An RS256 access token of the configured issuer. Jobs belong to its `sub`. Each "
    "operation names the scope that the token must have in `scope` or `permissions`.",
    auto_error=False,
)


class AuthenticatedFirst(APIRoute):
    """Route that authenticates the caller before FastAPI reads and validates a JSON body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def authenticate_first(request: Request) -> Response:
            await authenticated(request, await _bearer(request))
            return await handle(request)

        return authenticate_first


def services_of(request: Request) -> Services:
    return cast("Services", request.app.state.services)


async def authenticated(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Principal:
    """Return the caller. The token is verified once for each request.

    Raises Unauthenticated and DependencyUnavailable.
    """
    if credentials is None:
        raise Unauthenticated("send a bearer token in the Authorization header")
    known: Principal | None = getattr(request.state, "caller", None)
    if known is None:
        authenticator = services_of(request).authenticator
        known = request.state.caller = await authenticator.authenticate(credentials.credentials)
    current_owner.set(known.sub)  # for the limited places that this request waits for
    return known


async def _authorized(
    request: Request, needed: SecurityScopes, caller: Annotated[Principal, Depends(authenticated)]
) -> Principal:
    for scope in needed.scopes:
        if scope not in caller.scopes:
            raise Forbidden(f"the token lacks the scope {scope}", scope=scope)
    per_minute = caller.quotas.requests_per_minute
    if request.method in _UNCOUNTED or per_minute == 0:
        return caller
    try:
        rate = await services_of(request).rates.take(caller.sub, per_minute)
    except DependencyUnavailable as error:  # without Redis nothing is limited
        log.warning("request_not_counted", reason=error.message)
        return caller
    request.state.answer_headers = rate.headers()
    if not rate.allowed:
        raise RateLimited(
            f"you have exceeded your limit of {per_minute} requests a minute; try again later",
            limit=per_minute,
            retry_after_s=rate.retry_after_s,
        )
    return caller


def require(scope: Scope) -> Any:
    """Return a dependency that yields the caller if it has `scope`, and counts its requests.

    Use it for one parameter of a route. Raises Unauthenticated, Forbidden and RateLimited.
    """
    return Security(_authorized, scopes=[scope.value])


async def _services(request: Request) -> Services:
    # FastAPI runs a dependency that is not a coroutine in a thread, for each request.
    return services_of(request)


ServicesOf = Annotated[Services, Depends(_services)]
Reader = Annotated[Principal, require(Scope.READ)]
Writer = Annotated[Principal, require(Scope.WRITE)]


async def _listed_owner(
    caller: Reader,
    owner: Annotated[
        str | None,
        Query(
            description="Owner of the listed items. Other owners than the caller need the scope "
            "`admin`."
        ),
    ] = None,
) -> str:
    if owner is None or caller.reach in (None, owner):
        return owner or caller.sub
    raise Forbidden(f"listing other owners' items needs the scope {Scope.ADMIN}", scope=Scope.ADMIN)


ListedOwner = Annotated[str, Depends(_listed_owner)]


def next_page(
    request: Request, caller: Principal, owner: str, cursor: str | None, **query: object
) -> str | None:
    """Return the path of a listing's next page, or None after the last one."""
    if cursor is None:
        return None
    asked = {"cursor": cursor, "owner": None if owner == caller.sub else owner, **query}
    given = {name: value for name, value in asked.items() if value is not None}
    return f"{request.url.path}?{urlencode(given, doseq=True)}"
