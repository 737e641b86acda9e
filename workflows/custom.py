"""A user's own graph as a workflow: the same jobs, the same path to an engine. Pure.

Such a job names the workflow `custom`, which is in no catalogue, and carries the checked graph as
its one parameter. So there is nothing else to store, to expire or to lose.
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
    """A job's parameters for what `check_graph` returned."""
    return {_GRAPH: json.dumps(graph, separators=(",", ":"))}


def graph_of(params: Mapping[str, ParamValue]) -> Graph:
    """The graph that `params_of` was given."""
    graph: Graph = json.loads(str(params[_GRAPH]))
    return graph


def workflow_of(catalog: Catalog, job: Job) -> Workflow:
    """The workflow of a recorded job, as it was submitted. Raises UnknownWorkflow."""
    if job.workflow == CUSTOM:
        return custom_workflow(graph_of(job.params))
    return catalog.version(job.workflow, job.workflow_version)


def custom_workflow(graph: Graph) -> Workflow:
    """`graph` is what `check_graph` returned: the photo goes in at its LoadImage, the result comes
    out at its SaveImage."""
    (load,), (save,) = nodes_of(graph, LOAD), nodes_of(graph, SAVE)
    manifest = Manifest(
        name=CUSTOM,
        version="1",
        title="A graph of one's own",
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
            keeps_grey=False,  # whether it colours is the graph's own business
        ),
        parameters=(),
    )
    return Workflow(manifest, MappingProxyType(dict(graph)), create_model("NoParameters"))
