"""Where the wheels of the `local` extra have put their servers."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from restoration.errors import SetupError


def folder_of_package(name: str) -> Path:
    """The folder of an importable package, which is not imported. Raises SetupError."""
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
    """A program that a distribution has put beside the interpreter. Raises SetupError."""
    version_of(distribution)
    for file in metadata.files(distribution) or ():
        if file.name == name:
            return Path(str(file.locate())).resolve()
    raise _missing(distribution)


def _missing(name: str) -> SetupError:
    return SetupError(
        f"{name} is not installed: install comfy-restore[local], or set the service's URL"
    )
