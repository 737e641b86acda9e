"""serve_config.yaml, checked with Serve's own validators and against our code."""

from __future__ import annotations

import copy
import importlib.util

import pytest
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.schema import ServeDeploySchema

from actors.cluster.handles import APP, INGRESS
from serve_app.deployment import build
from tests.support.cluster_files import RAY, Config, Mutation, load, set_at, validate_serve
from workflows.catalog import load_catalog


@pytest.fixture
def serve_config() -> Config:
    return load("serve_config.yaml")


def test_serve_accepts_the_application(serve_config: Config) -> None:
    """Serve's schema and PoolArgs accept serve_config.yaml, and its names exist in the code."""
    validate_serve(serve_config)
    application = ServeDeploySchema.model_validate(serve_config).applications[0]
    module, _, attribute = application.import_path.partition(":")

    assert application.name == APP
    assert application.route_prefix == "/"
    assert INGRESS in {deployment.name for deployment in application.deployments}
    assert importlib.util.find_spec(module) is not None
    assert getattr(importlib.import_module(module), attribute) is build


def test_another_release_is_rolled_out(serve_config: Config) -> None:
    """Serve replaces the replicas only if the deployed file has another release."""

    def version(release: str) -> str:
        serve_config["applications"][0]["args"]["release"] = release
        return get_app_code_version(ServeDeploySchema.model_validate(serve_config).applications[0])

    assert version("1") == version("1")
    assert version("1") != version("2")


def test_streams_are_not_cut(serve_config: Config) -> None:
    """Serve has no time limit for requests, which would end event streams."""
    options = ServeDeploySchema.model_validate(serve_config).http_options

    assert options.request_timeout_s is None
    assert (options.host, options.port) == ("0.0.0.0", 8000)  # noqa: S104 # behind a balancer


def _of_application(mutate: Mutation) -> Mutation:
    return lambda config: mutate(config["applications"][0])


@pytest.mark.parametrize(
    ("mutate", "complaint"),
    [
        pytest.param(
            _of_application(set_at("import_path", to="serve_app.deployment:")),
            "import path",
            id="import path without a target",
        ),
        pytest.param(
            _of_application(set_at("args", "worker_gpu", to=1)),
            "worker_gpu",
            id="misspelt argument",
        ),
        pytest.param(
            _of_application(set_at("args", "workers_max", to=0)), "workers_max", id="no workers"
        ),
        pytest.param(
            _of_application(set_at("port", to=8000)), "Port 8000", id="port in two places"
        ),
        pytest.param(set_at("proxy_location", to="Head"), "proxy_location", id="no such place"),
        pytest.param(
            lambda config: config["applications"][0]["deployments"][0].update(name="Ingres"),
            "Ingres",
            id="no such deployment",
        ),
    ],
)
def test_serve_refuses_a_planted_error(
    serve_config: Config, mutate: Mutation, complaint: str
) -> None:
    """The validation can fail: it refuses each of these mistakes."""
    mutate(copied := copy.deepcopy(serve_config))

    with pytest.raises(ValueError, match=complaint):
        validate_serve(copied)


def test_a_worker_may_finish_its_job(serve_config: Config) -> None:
    """Scale-down waits for longer than any workflow may take."""
    args = validate_serve(serve_config)

    assert args.drain_s > max(workflow.manifest.run_limit_s for workflow in load_catalog())


def test_gpu_nodes_can_become_idle(serve_config: Config) -> None:
    """Deployments without CPUs are kept on the head, because on a GPU node they would keep it
    alive."""
    args = validate_serve(serve_config)
    application = serve_config["applications"][0]
    kept = {
        deployment["name"]
        for deployment in application["deployments"]
        if "node:__internal_head__" in deployment["ray_actor_options"]["resources"]
    }

    assert kept == RAY.deployment_names(build(args)) - {"GpuWorker"}
    assert serve_config["proxy_location"] == "HeadOnly"
