"""Locate the servers in the wheels of the `local` extra."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from restoration.errors import SetupError


def folder_of_package(name: str) -> Path:
    """Return the folder of a package without importing it. Raises SetupError if it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise _missing(name)
    return Path(spec.origin).parent


def version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise _missing(distribution) from None


def program_of(distribution: str, name: str) -> Path:
    """Return the path of a program of a distribution. Raises SetupError if it is missing."""
    version_of(distribution)
    for file in metadata.files(distribution) or ():
        if file.name == name:
            return Path(str(file.locate())).resolve()
    raise _missing(distribution)


def _missing(name: str) -> SetupError:
    return SetupError(
        f"{name} is not installed; install comfy-restore[local], or set the service's URL"
    )
