"""Load the workflow folders, and reject workflows that cannot run.

`load_catalog` checks that each workflow's graph and manifest agree. `Catalog.check_models` and
`Catalog.check_nodes` check it against the installed models and the engine's node classes. Every
rejection is a SetupError that names the workflow and the faulty part.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from restoration.errors import (
    InvalidParameters,
    InvalidSettings,
    ModelMissing,
    UnknownWorkflow,
    WorkflowInvalid,
)
from restoration.jobs import ParamValue
from workflows.manifest import CUSTOM, Manifest, ModelSpec

BUILT_IN = Path(__file__).parent
OLDER = "older"
MODEL_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin", ".pkl", ".onnx", ".gguf")


class _Node(BaseModel):
    class_type: str
    inputs: dict[str, Any]


_Graph = Mapping[str, _Node]
_GRAPH: TypeAdapter[dict[str, _Node]] = TypeAdapter(dict[str, _Node])


@dataclass(frozen=True, slots=True)
class Workflow:
    """A checked graph template with its manifest. Immutable."""

    manifest: Manifest
    graph: Mapping[str, Mapping[str, Any]]
    _parameters: type[BaseModel] = field(repr=False)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    def parameters_schema(self) -> dict[str, Any]:
        """Return the JSON Schema (draft 2020-12) of the parameters that `resolve` accepts."""
        schema = self._parameters.model_json_schema()
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    def resolve(self, params: Mapping[str, object]) -> dict[str, ParamValue]:
        """Validate `params` and return all parameters, with defaults filled in.

        Raises InvalidParameters, whose `details["problems"]` maps each parameter to its problem.
        """
        try:
            return self._parameters.model_validate(dict(params)).model_dump()
        except ValidationError as error:
            problems = {str(e["loc"][0]): e["msg"] for e in error.errors()}
        for name in problems.keys() - self._parameters.model_fields.keys():
            known = ", ".join(self._parameters.model_fields)
            problems[name] = f"unknown parameter; the parameters are {known}"
        listing = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise InvalidParameters(
            f"invalid parameters for the workflow {self.name}: {listing}", problems=problems
        )


@dataclass(frozen=True, slots=True)
class Catalog:
    """All workflows: the newest versions by name, older ones by name and version.

    New jobs always get the newest version. Older ones remain for jobs submitted with them.
    """

    workflows: Mapping[str, Workflow]
    older: Mapping[tuple[str, str], Workflow] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Workflow]:
        return iter(self.workflows.values())

    def __len__(self) -> int:
        return len(self.workflows)

    def find(self, name: str) -> Workflow:
        """Return the newest version. Raises UnknownWorkflow, which lists the known names."""
        try:
            return self.workflows[name]
        except KeyError:
            known = sorted(self.workflows)
            raise UnknownWorkflow(
                f"the workflow {name!r} does not exist; choose from {', '.join(known)}", known=known
            ) from None

    def version(self, name: str, version: str) -> Workflow:
        """Return the given version of a workflow. Raises UnknownWorkflow."""
        newest = self.find(name)
        if newest.version == version:
            return newest
        try:
            return self.older[name, version]
        except KeyError:
            raise UnknownWorkflow(f"the workflow {name} has no version {version}") from None

    def versions(self) -> list[Workflow]:
        """Return all versions of all workflows."""
        return [*self, *self.older.values()]

    def models(self) -> list[ModelSpec]:
        """Return the models that any version of a workflow needs, without duplicates."""
        needed = (model for workflow in self.versions() for model in workflow.manifest.models)
        return list(dict.fromkeys(needed))

    def sharing_models(self, name: str) -> frozenset[str]:
        """Return the names of the workflows that need no models beyond those of `name`."""
        held = set(self.find(name).manifest.models)
        return frozenset(each.name for each in self if held.issuperset(each.manifest.models))

    def check_models(self, models_dir: Path) -> None:
        """Raise ModelMissing for the first model that is missing or has another sha256."""
        for workflow in self.versions():
            for model in workflow.manifest.models:
                if (problem := model_problem(model, models_dir)) is not None:
                    raise ModelMissing(
                        f"the workflow {workflow.name} cannot run: {problem}",
                        workflow=workflow.name,
                        model=model.name,
                    )

    def check_nodes(self, node_classes: Collection[str]) -> None:
        """Raise WorkflowInvalid if a workflow uses a class that is not in `node_classes`.

        `node_classes` are the engine's, from GET /object_info.
        """
        for workflow in self.versions():
            if missing := sorted(workflow.manifest.nodes.difference(node_classes)):
                raise _invalid(
                    workflow.name, f"the engine lacks the node classes {', '.join(missing)}"
                )


def model_problem(model: ModelSpec, models_dir: Path) -> str | None:
    """Return the problem of a model file, missing or with another sha256, or None.

    Reads the whole file.
    """
    path = models_dir / model.folder / model.name
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return f"the model file {path} is missing"
    if sha256 != model.sha256:
        return f"the model file {path} has sha256 {sha256}, not {model.sha256}"
    return None


def load_catalog(root: Path = BUILT_IN, more: Path | None = None) -> Catalog:
    """Load all folders with a manifest.toml in `root` and, if given, in `more`.

    Older versions of a workflow are loaded from its folders `older/<version>`. Raises
    WorkflowInvalid, also for a name that occurs twice, and InvalidSettings if `more` is not a
    folder.
    """
    if more is not None and not more.is_dir():
        raise InvalidSettings(f"WORKFLOWS_DIR: {more} is not a readable folder")
    folders = sorted(path.parent for path in root.glob("*/manifest.toml"))
    folders += sorted(path.parent for path in more.glob("*/manifest.toml")) if more else []
    workflows: dict[str, Workflow] = {}
    for folder in folders:
        if folder.name in workflows:
            raise _invalid(
                folder.name, f"{folder} has the name of another workflow; choose another name"
            )
        workflows[folder.name] = load_workflow(folder)
    older = {
        (folder.name, path.parent.name): _load_older(path.parent, workflows[folder.name])
        for folder in folders
        for path in sorted(folder.glob(f"{OLDER}/*/manifest.toml"))
    }
    return Catalog(MappingProxyType(workflows), MappingProxyType(older))


def _load_older(folder: Path, newest: Workflow) -> Workflow:
    name = newest.name
    workflow = load_workflow(folder, name)
    if workflow.version != folder.name:
        raise _invalid(
            name,
            f"{folder} contains version {workflow.version!r}, but must be named after its version",
        )
    if workflow.version == newest.version:
        raise _invalid(
            name, f"{folder} has the same version as the newest; raise the version of the newest"
        )
    return workflow


def load_workflow(folder: Path, name: str | None = None) -> Workflow:
    """Load the workflow in `folder`. Its name must be `name`, by default the folder's name.

    Raises WorkflowInvalid if a file cannot be read, or if graph and manifest disagree.
    """
    name = name or folder.name
    try:
        manifest = Manifest.model_validate(tomllib.loads((folder / "manifest.toml").read_text()))
        graph = json.loads((folder / "graph.json").read_text())
        nodes = _GRAPH.validate_python(graph)
        parameters = manifest.parameters_model()
        parameters()  # raises if a default is outside its bounds
    except ValidationError as error:
        found = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise _invalid(name, "; ".join(found)) from error
    except (OSError, ValueError) as error:  # including errors of the TOML and JSON parsers
        raise _invalid(name, str(error)) from error
    if name == CUSTOM:
        raise _invalid(name, "the name is reserved for users' own graphs; choose another")
    if manifest.name != name:
        raise _invalid(name, f"its manifest has the name {manifest.name!r}")
    if problems := list(_misfits(manifest, nodes)):
        raise _invalid(manifest.name, "; ".join(problems))
    return Workflow(manifest, MappingProxyType(graph), parameters)


def _invalid(workflow: str, problem: str) -> WorkflowInvalid:
    return WorkflowInvalid(f"the workflow {workflow} is invalid: {problem}", workflow=workflow)


def _misfits(manifest: Manifest, graph: _Graph) -> Iterator[str]:
    """Yield each contradiction between graph and manifest."""
    classes = {node.class_type for node in graph.values()}
    for missing in sorted(manifest.nodes - classes):
        yield f"the manifest lists the node class {missing}, which the graph does not use"
    for extra in sorted(classes - manifest.nodes):
        yield f"the graph uses the node class {extra}, which the manifest does not list"
    bindings = (binding for parameter in manifest.parameters for binding in parameter.bindings)
    for target in (manifest.image, manifest.output, *bindings):
        if target.node not in graph:
            yield f"the manifest names the node {target.node!r}, which is not in the graph"
        elif target.input not in graph[target.node].inputs:
            yield (
                f"the manifest names the input {target.input!r}, which node {target.node!r} does "
                "not have"
            )
        elif isinstance(graph[target.node].inputs[target.input], list):
            yield (
                f"the input {target.input!r} of node {target.node!r} is a link and cannot take a "
                "value"
            )
    used: set[str] = set()
    for node_id, node in graph.items():
        for name, value in node.inputs.items():
            where = f"the input {name!r} of node {node_id!r}"
            match value:
                case [str(source), int()]:
                    if source not in graph:
                        yield f"{where} links to the missing node {source!r}"
                case list():
                    yield f"{where} is a list, but not a link: [node id, output]"
                case str() if value.endswith(MODEL_SUFFIXES):
                    used.add(value)
    for name in sorted(used ^ {model.name for model in manifest.models}):
        yield f"the model {name} is named by {'its graph' if name in used else 'its manifest'} only"
