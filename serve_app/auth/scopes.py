"""Token scopes, and the scopes that each of them implies.

Auth0 lists them in `permissions` (RBAC) or in `scope` (RFC 6749); both count.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any


class Scope(StrEnum):
    READ = "restorations:read"
    WRITE = "restorations:write"
    RUN = "workflows:run"
    ADMIN = "admin"


# Enough to submit photos and fetch their results.
USER_SCOPES = (Scope.READ, Scope.WRITE)
# `admin` covers the jobs of all owners. It does not include `workflows:run`: running a graph of
# one's own is granted separately.
_IMPLIED: Mapping[str, Collection[Scope]] = MappingProxyType({Scope.ADMIN: USER_SCOPES})


def granted(claims: Mapping[str, Any]) -> frozenset[str]:
    """Return the scopes that a token's claims grant, with those they imply.

    Raises ValueError for claims of the wrong type.
    """
    scope, permissions = claims.get("scope", ""), claims.get("permissions", [])
    if not isinstance(scope, str):
        raise ValueError("scope must be a string")
    if not (isinstance(permissions, list) and all(isinstance(each, str) for each in permissions)):
        raise ValueError("permissions must be a list of strings")
    # RFC 6749 separates scopes by spaces only: any other character is part of a name
    named = {*filter(None, scope.split(" ")), *permissions}
    return frozenset(named.union(*(_IMPLIED.get(each, ()) for each in named)))
