"""cluster.yaml, serve_config.yaml and .env.example, held to Ray's own validators and to our code.

Nothing here reaches a cloud. What `ray up` asks AWS about (images, subnets, roles) is not checked.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import subprocess
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from actors.handles import APP, INGRESS
from restoration.settings import Settings, load_settings
from serve_app.deployment import LOCAL_ENVIRONMENT, PoolArgs, build
from workflows.catalog import load_catalog

ROOT = Path(__file__).parents[2]
Config = dict[str, Any]
Mutation = Callable[[Config], object]


def _ray_privates() -> SimpleNamespace:
    """All that these tests use of Ray and that Ray does not promise to keep; hence its exact pin.

    They are what `ray up`, the autoscaler on the head and `serve deploy` run.
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


def _load(name: str) -> Config:
    config: Config = yaml.safe_load((ROOT / name).read_text())
    return config


def validate_cluster(config: Config) -> Any:
    """As `ray up` and then the autoscaler do; returns the autoscaler's view of each node type."""
    jsonschema.validate(config, RAY.schema)
    prepared = RAY.prepare_config(copy.deepcopy(config))
    RAY.validate_config(prepared)
    # without hashes of the mounted files, which an operator makes
    return RAY.AutoscalingConfig(prepared, skip_content_hash=True).get_node_type_configs()


def validate_serve(config: Config) -> PoolArgs:
    """As `serve deploy` does, and the controller when it builds the application."""
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    args = PoolArgs.model_validate(application.args)
    names = RAY.deployment_names(RAY.build(build, application.args))
    for deployment in application.deployments:
        if deployment.name not in names:
            raise ValueError(f"{application.name} has no deployment {deployment.name}")
    return args


@pytest.fixture
def cluster() -> Config:
    return _load("cluster.yaml")


@pytest.fixture
def serve_config() -> Config:
    return _load("serve_config.yaml")


def gpu_types(cluster: Config) -> dict[str, Config]:
    types: dict[str, Config] = cluster["available_node_types"]
    return {name: kind for name, kind in types.items() if kind["resources"].get("GPU")}


def test_ray_accepts_the_cluster(cluster: Config) -> None:
    """Ray's validators take cluster.yaml, which has a head without GPU and both GPU markets."""
    types = validate_cluster(cluster)

    assert set(types) == {"head", "gpu.ondemand", "gpu.spot", "gpu.ondemand.4", "gpu.spot.4"}
    assert {name: types[name].resources["GPU"] for name in gpu_types(cluster)} == {
        **{"gpu.ondemand": 1, "gpu.spot": 1},
        **{"gpu.ondemand.4": 4, "gpu.spot.4": 4},
    }
    assert "GPU" not in types["head"].resources
    assert {types[name].min_worker_nodes for name in gpu_types(cluster)} == {0}
    assert [
        name
        for name, kind in gpu_types(cluster).items()
        if kind["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
    ] == ["gpu.spot", "gpu.spot.4"]


def _set(*path: str, to: object) -> Mutation:
    def mutate(config: Config) -> None:
        at: Any = config
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to

    return mutate


SPOT = ("available_node_types", "gpu.spot")


@pytest.mark.parametrize(
    ("mutate", "error"),
    [
        pytest.param(_set("max_worker", to=8), jsonschema.ValidationError, id="misspelt key"),
        pytest.param(
            _set(*SPOT, "resources", "GPU", to="1"),
            jsonschema.ValidationError,
            id="text, no number",
        ),
        pytest.param(_set("head_node_type", to="haed"), ValueError, id="no such head"),
        pytest.param(_set(*SPOT, "min_workers", to=9), ValueError, id="minimum over all limits"),
        pytest.param(_set(*SPOT, "max_workers", to=-1), AssertionError, id="maximum under minimum"),
    ],
)
def test_ray_refuses_a_planted_error(
    cluster: Config, mutate: Mutation, error: type[Exception]
) -> None:
    """The validation above can fail: one of Ray's validators refuses each of these mistakes."""
    mutate(cluster)

    with pytest.raises(error):
        validate_cluster(cluster)


def test_spot_is_taken_before_on_demand(cluster: Config) -> None:
    """Both of Ray's autoscalers fill the spot type up before they turn to the other."""
    demand = [{"GPU": 1, "CPU": 3}] * 10

    types = validate_cluster(cluster)
    chosen = RAY.choose_nodes(cluster["available_node_types"], "head", 10, demand)

    assert types["gpu.spot"].priority > types["gpu.ondemand"].priority
    assert types["gpu.spot.4"].priority > types["gpu.ondemand.4"].priority
    assert chosen == {"gpu.spot": 8, "gpu.ondemand": 2}


def test_01_nodes_of_four_gpus_are_for_more_than_single_ones_give(cluster: Config) -> None:
    """Four workers find room on one node, spot first, once the single ones are at their limits."""
    demand = [{"GPU": 1, "CPU": 3}] * 20

    chosen = RAY.choose_nodes(cluster["available_node_types"], "head", 20, demand)

    assert chosen == {"gpu.spot": 8, "gpu.ondemand": 4, "gpu.spot.4": 2}


def commands(config: Config) -> list[str]:
    keys = [key for key in config if key.endswith("_commands")]
    return [command for key in keys for command in config[key]]


def test_commands_are_shell(cluster: Config) -> None:
    """bash can parse every command."""
    for command in commands(cluster):
        parsed = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert parsed.returncode == 0, parsed.stderr


@pytest.fixture
def node_environ(cluster: Config, tmp_path: Path) -> Mapping[str, str]:
    """What a process on a node finds, by the set-up command that writes it and by .env.example."""
    (write,) = (command for command in cluster["setup_commands"] if command.startswith("cat >"))
    (tmp_path / "comfy-restore.env").write_text((ROOT / ".env.example").read_text())
    # Ray's launcher sets the last one
    environ = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    script = f"({write}) && . ~/comfy-restore.sh && env -0"
    done = subprocess.run(["bash", "-ec", script], env=environ, capture_output=True, check=True)
    lines = done.stdout.decode().split("\0")
    return dict(line.split("=", 1) for line in lines if line)


def test_nodes_have_the_environment_that_we_need(node_environ: Mapping[str, str]) -> None:
    """Set-up leaves a file that, sourced, holds our settings, Ray's, and no thread limit."""
    settings = load_settings(node_environ)

    assert settings.engine_variant == "cuda"
    assert settings.s3_access_key is None  # the instance profile's turn
    assert node_environ["RAY_AUTH_MODE"] == "token"
    assert node_environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    as_here = LOCAL_ENVIRONMENT.keys() - {"RAY_USAGE_STATS_ENABLED"}
    assert {name: node_environ[name] for name in as_here} == {
        name: LOCAL_ENVIRONMENT[name] for name in as_here
    }
    assert node_environ["PATH"].startswith(f"{node_environ['HOME']}/comfy-restore/bin:")
    assert "OMP_NUM_THREADS" not in node_environ


def test_every_start_command_has_that_environment(cluster: Config) -> None:
    """No Ray process starts without token authentication or without our settings."""
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]

    assert all(command.startswith(". ~/comfy-restore.sh && ") for command in starts)
    assert "ray start --head" in " ".join(cluster["head_start_ray_commands"])
    assert cluster["head_start_ray_commands"][-1].endswith("serve deploy ~/serve_config.yaml")


def test_gpu_nodes_wait_for_their_head(cluster: Config) -> None:
    """Longer than it takes to notice that the head is gone, and to start it again."""
    [start] = [line for line in cluster["worker_start_ray_commands"] if "ray start" in line]

    assert "RAY_gcs_rpc_server_reconnect_timeout_s=600 ray start" in start


def test_nodes_get_this_release(cluster: Config) -> None:
    """The wheel that is mounted is installed, and is the one that pyproject.toml makes."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    wheel = f"comfy_restore-{version}-py3-none-any.whl"

    assert cluster["file_mounts"][f"~/{wheel}"] == f"dist/{wheel}"
    assert f"file:///home/{cluster['auth']['ssh_user']}/{wheel}" in " ".join(commands(cluster))
    for local in ("serve_config.yaml", "requirements.lock"):
        assert (ROOT / cluster["file_mounts"][f"~/{local}"]).is_file()


def test_serve_accepts_the_application(serve_config: Config) -> None:
    """Serve's schema and PoolArgs take serve_config.yaml; its names are the code's names."""
    validate_serve(serve_config)
    application = ServeDeploySchema.model_validate(serve_config).applications[0]
    module, _, attribute = application.import_path.partition(":")

    assert application.name == APP
    assert application.route_prefix == "/"
    assert INGRESS in {deployment.name for deployment in application.deployments}
    assert importlib.util.find_spec(module) is not None
    assert getattr(importlib.import_module(module), attribute) is build


def test_streams_are_not_cut(serve_config: Config) -> None:
    """Serve sets no limit on the time of a request, which would end a stream of events."""
    options = ServeDeploySchema.model_validate(serve_config).http_options

    assert options.request_timeout_s is None
    assert (options.host, options.port) == ("0.0.0.0", 8000)  # noqa: S104 # behind a balancer


def _of_application(mutate: Mutation) -> Mutation:
    return lambda config: mutate(config["applications"][0])


@pytest.mark.parametrize(
    ("mutate", "complaint"),
    [
        pytest.param(
            _of_application(_set("import_path", to="serve_app.deployment:")),
            "import path",
            id="import path without a target",
        ),
        pytest.param(
            _of_application(_set("args", "worker_gpu", to=1)), "worker_gpu", id="misspelt argument"
        ),
        pytest.param(
            _of_application(_set("args", "workers_max", to=0)), "workers_max", id="no workers"
        ),
        pytest.param(_of_application(_set("port", to=8000)), "Port 8000", id="port in two places"),
        pytest.param(_set("proxy_location", to="Head"), "proxy_location", id="no such place"),
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
    """The validation above can fail: it refuses each of these mistakes."""
    mutate(copied := copy.deepcopy(serve_config))

    with pytest.raises(ValueError, match=complaint):
        validate_serve(copied)


def test_a_worker_fits_each_gpu_node(cluster: Config, serve_config: Config) -> None:
    """A worker can be placed on every GPU type, and all workers at a time on the fleet."""
    args = validate_serve(serve_config)
    types = gpu_types(cluster)

    for kind in types.values():
        assert kind["resources"]["GPU"] >= args.worker_gpus
        assert kind["resources"]["CPU"] >= args.worker_cpus
    gpus_per_node = min(kind["resources"]["GPU"] for kind in types.values())
    assert args.workers_max * args.worker_gpus <= cluster["max_workers"] * gpus_per_node


def test_08_the_cluster_opens_two_ports_to_others(cluster: Config, serve_config: Config) -> None:
    """The rules that `ray up` writes: everything between the nodes, HTTP from the VPC where the
    load balancer is, and SSH, by key, which Ray opens by itself."""
    group = cluster["provider"]["security_group"]
    between_nodes, *others = RAY.inbound_rules({"sg-of-the-nodes"}, group["IpPermissions"])

    assert between_nodes["UserIdGroupPairs"] == [{"GroupId": "sg-of-the-nodes"}]
    assert "IpRanges" not in between_nodes
    assert [(rule["FromPort"], rule["ToPort"], rule["IpRanges"]) for rule in others] == [
        (22, 22, [{"CidrIp": "0.0.0.0/0"}]),
        (8000, 8000, [{"CidrIp": "172.31.0.0/16"}]),
    ]
    assert serve_config["http_options"]["port"] == 8000
    for kind in cluster["available_node_types"].values():
        assert "SecurityGroupIds" not in kind["node_config"]
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}


def test_08_the_cluster_asks_for_tokens_and_hides_its_dashboard(cluster: Config) -> None:
    """Ray's own ports answer holders of its token; its dashboard is on the head's loopback."""
    [profile] = [each for each in cluster["setup_commands"] if "comfy-restore.sh" in each]
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]

    assert "export RAY_AUTH_MODE=token\n" in profile
    assert "chmod 600 ~/comfy-restore.env ~/.ray/auth_token" in cluster["setup_commands"]
    assert all(". ~/comfy-restore.sh &&" in each for each in starts)
    [head] = [each for each in starts if "ray start --head" in each]
    assert "--dashboard-host=127.0.0.1" in head


def test_a_worker_may_finish_its_job(serve_config: Config) -> None:
    """Scale-down waits for longer than any workflow may take."""
    args = validate_serve(serve_config)

    assert args.drain_s > max(workflow.manifest.run_limit_s for workflow in load_catalog())


def test_gpu_nodes_can_become_idle(serve_config: Config) -> None:
    """What asks for no CPU is kept on the head: on a GPU node it would keep that node for ever."""
    args = validate_serve(serve_config)
    application = serve_config["applications"][0]
    kept = {
        deployment["name"]
        for deployment in application["deployments"]
        if "node:__internal_head__" in deployment["ray_actor_options"]["resources"]
    }

    assert kept == RAY.deployment_names(build(args)) - {"GpuWorker"}
    assert serve_config["proxy_location"] == "HeadOnly"


# a comment, then the variable, behind `#` if it need not be set
VARIABLE = re.compile(r"^# (.+)\n(#?)([A-Z][A-Z0-9_]*)=(.*)$", re.MULTILINE)


@pytest.fixture
def example() -> str:
    return (ROOT / ".env.example").read_text()


def test_every_setting_is_in_the_example(example: str) -> None:
    """.env.example names each setting once, with a comment above, and nothing else but Ray's."""
    names = [name for _, _, name, _ in VARIABLE.findall(example)]

    assert names == re.findall(r"^#?([A-Z][A-Z0-9_]*)=", example, re.MULTILINE)
    assert len(names) == len(set(names))
    ours = {name for name in names if not name.startswith("RAY_")}
    assert ours == {field.alias for field in Settings.model_fields.values()}


def test_the_example_shows_the_defaults(example: str) -> None:
    """What .env.example shows behind `#`, unless it says e.g., holds when nothing is set."""
    found = VARIABLE.findall(example)
    required = {name: value for _, off, name, value in found if not off}
    defaults = {name: value for text, off, name, value in found if off and "(e.g." not in text}
    needed = {field.alias: field.is_required() for field in Settings.model_fields.values()}

    assert set(required) == {name for name, is_needed in needed.items() if is_needed}
    assert load_settings(required | defaults) == load_settings(required)
    assert len(defaults) >= 10
