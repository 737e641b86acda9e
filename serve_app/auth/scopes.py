"""What a token may be good for: the scopes, and which of them stands for which others.

A token of Auth0 lists them in `permissions` (RBAC) or in `scope` (RFC 6749); both count.
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


# What a person needs to have photos restored.
USER_SCOPES = (Scope.READ, Scope.WRITE)
# An operator looks after everybody's jobs; a graph of one's own is a power of its own.
_IMPLIED: Mapping[str, Collection[Scope]] = MappingProxyType({Scope.ADMIN: USER_SCOPES})


def granted(claims: Mapping[str, Any]) -> frozenset[str]:
    """The scopes that a token's claims name. Raises ValueError for claims of other types."""
    scope, permissions = claims.get("scope", ""), claims.get("permissions", [])
    if not isinstance(scope, str):
        raise ValueError("its scope is not a text")
    if not (isinstance(permissions, list) and all(isinstance(each, str) for each in permissions)):
        raise ValueError("its permissions are not a list of texts")
    # RFC 6749 has the space as the only separator: any other character is part of a name
    named = {*filter(None, scope.split(" ")), *permissions}
    return frozenset(named.union(*(_IMPLIED.get(each, ()) for each in named)))
