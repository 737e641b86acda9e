"""Represent a user's own graph as a workflow, so that it runs like any other job.

Such a job has the workflow name `custom`, which is not in the catalog, and the checked graph as its
only parameter. Nothing else needs to be stored or expired.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

from pydantic import create_model

from restoration.jobs import Job, OutputFormat, ParamValue
from workflows.catalog import Catalog, Workflow
from workflows.graphs import LOAD, SAVE, Graph, nodes_of
from workflows.manifest import CUSTOM, Manifest, Output, Target

_GRAPH = "graph"
_RUN_LIMIT_S = 600
_MAX_ATTEMPTS = 2  # a graph that breaks an engine breaks the next one too


def params_of(graph: Graph) -> dict[str, ParamValue]:
    """Return the job parameters for a graph that `check_graph` returned."""
    return {_GRAPH: json.dumps(graph, separators=(",", ":"))}


def graph_of(params: Mapping[str, ParamValue]) -> Graph:
    """Return the graph from parameters that `params_of` made."""
    graph: Graph = json.loads(str(params[_GRAPH]))
    return graph


def workflow_of(catalog: Catalog, job: Job) -> Workflow:
    """Return the workflow of a recorded job, in its version. Raises UnknownWorkflow."""
    if job.workflow == CUSTOM:
        return custom_workflow(graph_of(job.params))
    return catalog.version(job.workflow, job.workflow_version)


def custom_workflow(graph: Graph) -> Workflow:
    """Return the workflow for a graph that `check_graph` returned.

    Its LoadImage node receives the photo, and its SaveImage node saves the result.
    """
    (load,), (save,) = nodes_of(graph, LOAD), nodes_of(graph, SAVE)
    manifest = Manifest(
        name=CUSTOM,
        version="1",
        title="A user's own graph",
        description="",
        run_limit_s=_RUN_LIMIT_S,
        max_attempts=_MAX_ATTEMPTS,
        vram_mb=0,
        nodes=frozenset(node["class_type"] for node in graph.values()),
        image=Target(node=load, input="image"),
        output=Output(
            node=save,
            input="filename_prefix",
            formats=tuple(OutputFormat),
            default_format=OutputFormat.PNG,
            keeps_grey=False,  # a custom graph may colour the photo
        ),
        parameters=(),
    )
    return Workflow(manifest, MappingProxyType(dict(graph)), create_model("NoParameters"))
