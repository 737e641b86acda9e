"""Cluster and Serve configuration files, and Ray's own validators for them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from actors.cluster.handles import APP
from serve_app.deployment import PoolArgs, build

ROOT = Path(__file__).parents[2]
Config = dict[str, Any]
Mutation = Callable[[Config], object]


def _ray_privates() -> SimpleNamespace:
    """Return every private part of Ray that these tests use, the reason why Ray's version is
    pinned.

    They are the functions that `ray up`, the autoscaler on the head and `serve deploy` run.
    """
    from ray.autoscaler._private import resource_demand_scheduler as scheduler
    from ray.autoscaler._private import util
    from ray.autoscaler._private.aws.config import _create_default_inbound_rules
    from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve._private.build_app import build_app

    def choose_nodes(node_types: Config, head: str, count: int, demand: list[Config]) -> Config:
        scorer = partial(
            scheduler._default_utilization_scorer,
            node_availability_summary=NodeAvailabilitySummary(node_availabilities={}),
        )
        nodes: Config
        nodes, _ = scheduler.get_nodes_for(node_types, {}, head, count, demand, scorer)
        return nodes

    return SimpleNamespace(
        schema=json.loads(
            (Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text()
        ),
        prepare_config=util.prepare_config,
        validate_config=util.validate_config,
        AutoscalingConfig=AutoscalingConfig,
        choose_nodes=choose_nodes,
        build=call_user_app_builder_with_args_if_necessary,
        inbound_rules=_create_default_inbound_rules,
        deployment_names=lambda app: {
            deployment.name for deployment in build_app(app, name=APP).deployments
        },
    )


RAY = _ray_privates()


def load(name: str) -> Config:
    config: Config = yaml.safe_load((ROOT / name).read_text())
    return config


def validate_cluster(config: Config) -> Any:
    """Validate as `ray up` and the autoscaler do, and return the autoscaler's node types."""
    jsonschema.validate(config, RAY.schema)
    prepared = RAY.prepare_config(copy.deepcopy(config))
    RAY.validate_config(prepared)
    # Skip the hashes of the mounted files, which an operator creates.
    return RAY.AutoscalingConfig(prepared, skip_content_hash=True).get_node_type_configs()


def validate_serve(config: Config) -> PoolArgs:
    """Validate as `serve deploy` and the controller do, and return the application's arguments."""
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    args = PoolArgs.model_validate(application.args)
    names = RAY.deployment_names(RAY.build(build, application.args))
    for deployment in application.deployments:
        if deployment.name not in names:
            raise ValueError(f"{application.name} has no deployment {deployment.name}")
    return args


def set_at(*path: str, to: object) -> Mutation:
    def mutate(config: Config) -> None:
        at: Any = config
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to

    return mutate
