"""Classify owners by name as person, machine or other, for use as a metric label.

Auth0's subjects are `connection|id` for a person and `client id@clients` for a machine (Auth0
documentation, "Access Tokens"). Names of batch scripts and other issuers are OTHER.
"""

from __future__ import annotations

from enum import StrEnum

MACHINE_SUFFIX = "@clients"
PERSON_SEPARATOR = "|"


class OwnerClass(StrEnum):
    PERSON = "person"
    MACHINE = "machine"
    OTHER = "other"


def owner_class(owner: str) -> OwnerClass:
    if owner.endswith(MACHINE_SUFFIX):
        return OwnerClass.MACHINE
    return OwnerClass.PERSON if PERSON_SEPARATOR in owner else OwnerClass.OTHER
