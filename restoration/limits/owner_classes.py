"""What kind of owner a job has, told by its name alone: few enough kinds to count jobs by.

Auth0's subjects are `connection|id` for a person and `client id@clients` for a machine (its
documentation, "Access Tokens"). Other names are those of batch scripts and other issuers.
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
