"""Parameters are validated strictly, and the published JSON Schema agrees."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter, ValidationError

from restoration.errors import InvalidParameters
from workflows.catalog import load_catalog
from workflows.manifest import (
    Binding,
    BoolParameter,
    ChoiceParameter,
    Manifest,
    Output,
    Parameter,
    Target,
)

CATALOG = load_catalog()
RESTORE = CATALOG.find("restore")
SCHEMA = Draft202012Validator(RESTORE.parameters_schema())
TARGET = {"node": "a", "input": "b"}


def problems(params: dict[str, object]) -> dict[str, str]:
    with pytest.raises(InvalidParameters) as caught:
        RESTORE.resolve(params)
    found = caught.value.details["problems"]
    assert isinstance(found, dict)
    assert all(name in caught.value.message for name in found)
    return found


def test_no_parameters_means_the_defaults() -> None:
    """Without parameters, every one of them has its default."""
    assert RESTORE.resolve({}) == {"scale": 4, "strength": 0.75, "quality": 92}


def test_a_whole_number_is_a_number() -> None:
    """JSON writes 1.0 as 1: it is accepted where a float is expected, and becomes one."""
    strength = RESTORE.resolve({"strength": 1})["strength"]
    assert (strength, type(strength)) == (1.0, float)


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"scale": True}, "valid integer"),
        ({"scale": "3"}, "valid integer"),
        ({"scale": 2.5}, "valid integer"),
        ({"scale": None}, "valid integer"),
        ({"scale": 0}, "greater than or equal to 1"),
        ({"scale": 5}, "less than or equal to 4"),
        ({"strength": True}, "valid number"),
        ({"strength": "0.5"}, "valid number"),
        ({"strength": float("nan")}, "finite number"),
        ({"strength": float("inf")}, "finite number"),
        ({"strength": 1.01}, "less than or equal to 1"),
        ({"quality": 101}, "less than or equal to 100"),
        ({"Scale": 2}, "unknown parameter; the parameters are scale, strength, quality"),
    ],
)
def test_a_wrong_value_is_named(params: dict[str, object], problem: str) -> None:
    """The error names the wrong parameter and the expected value; nothing is coerced."""
    found = problems(params)
    assert found.keys() == params.keys()
    assert problem in next(iter(found.values()))


def test_every_wrong_parameter_is_named_at_once() -> None:
    """Two mistakes are two problems, so a client can correct both at once."""
    assert problems({"scale": 9, "strength": -1}).keys() == {"scale", "strength"}


def test_the_error_survives_pickling() -> None:
    """It crosses processes with its details."""
    with pytest.raises(InvalidParameters) as caught:
        RESTORE.resolve({"scale": 9})
    error = caught.value
    assert pickle.loads(pickle.dumps(error)).details == error.details  # noqa: S301 our own bytes


@pytest.mark.parametrize("workflow", list(CATALOG), ids=lambda workflow: workflow.name)
def test_the_schema_is_draft_2020_12(workflow: Any) -> None:
    """The schema is valid, closed, describes each parameter, and its defaults satisfy it."""
    schema = workflow.parameters_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"].endswith("draft/2020-12/schema")
    assert schema["additionalProperties"] is False
    assert all(field["description"] for field in schema["properties"].values())
    Draft202012Validator(schema).validate(workflow.resolve({}))


numbers = st.one_of(
    st.integers(-2, 120), st.floats(-1, 2).filter(lambda value: not value.is_integer())
)
values = st.one_of(numbers, st.booleans(), st.none(), st.text(max_size=3))
names = st.sampled_from(["scale", "strength", "quality", "other"])


@given(st.dictionaries(names, values))
def test_schema_and_validator_agree(params: dict[str, object]) -> None:
    """The schema and the validator accept the same values.

    The one exception: JSON Schema counts 2.0 as an integer, the validator requires 2.
    """
    allowed = SCHEMA.is_valid(params)
    try:
        resolved = RESTORE.resolve(params)
    except InvalidParameters:
        assert not allowed
    else:
        assert allowed
        assert resolved | params == resolved


def manifest_with(parameter: Parameter) -> Manifest:
    target = Target.model_validate(TARGET)
    output = Output.model_validate(TARGET | {"formats": ["png"], "default_format": "png"})
    return Manifest(
        name="some-thing", version="1", title="t", description="d", run_limit_s=1,
        max_attempts=1, vram_mb=0, nodes=frozenset({"A"}), image=target, output=output,
        parameters=(parameter,),
    )  # fmt: skip


def test_a_choice_is_one_of_its_words() -> None:
    """A choice accepts only its words, and its schema lists them."""
    parameter = ChoiceParameter(
        type="choice", name="method", description="d", default="area", choices=("area", "lanczos"),
        bindings=(Binding.model_validate(TARGET),),
    )  # fmt: skip
    model = manifest_with(parameter).parameters_model()
    assert model.model_json_schema()["properties"]["method"]["enum"] == ["area", "lanczos"]
    assert model.model_validate({"method": "lanczos"}).model_dump() == {"method": "lanczos"}
    with pytest.raises(ValidationError, match="'area' or 'lanczos'"):
        model.model_validate({"method": "cubic"})


def test_a_flag_is_true_or_false() -> None:
    """A flag accepts no 1 and no "yes"."""
    parameter = BoolParameter(
        type="bool", name="flip", description="d", default=False,
        bindings=(Binding.model_validate(TARGET),),
    )  # fmt: skip
    model = manifest_with(parameter).parameters_model()
    assert model.model_validate({"flip": True}).model_dump() == {"flip": True}
    for wrong in (1, "yes"):
        with pytest.raises(ValidationError):
            model.model_validate({"flip": wrong})


def test_only_numbers_have_factors() -> None:
    """A factor on a flag or a choice would mean nothing, so it is refused."""
    with pytest.raises(ValidationError, match="cannot have a factor"):
        TypeAdapter[Any](Parameter).validate_python(
            {
                "type": "bool", "name": "flip", "description": "d", "default": False,
                "bindings": [TARGET | {"factor": 2}],
            }
        )  # fmt: skip
