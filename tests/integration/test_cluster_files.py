"""cluster.yaml, checked with Ray's own validators and against the needs of its nodes.

Nothing here reaches a cloud: what `ray up` asks AWS about (images, subnets, roles) is not checked.
"""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path

import jsonschema
import pytest

from restoration.settings import load_settings
from serve_app.deployment import LOCAL_DEFAULTS, LOCAL_ENVIRONMENT
from serve_app.haproxy import PROGRAM
from tests.support.cluster_files import (
    RAY,
    ROOT,
    Config,
    Mutation,
    load,
    set_at,
    validate_cluster,
    validate_serve,
)


@pytest.fixture
def cluster() -> Config:
    return load("cluster.yaml")


@pytest.fixture
def serve_config() -> Config:
    return load("serve_config.yaml")


def gpu_types(cluster: Config) -> dict[str, Config]:
    types: dict[str, Config] = cluster["available_node_types"]
    return {name: kind for name, kind in types.items() if kind["resources"].get("GPU")}


def test_ray_accepts_the_cluster(cluster: Config) -> None:
    """Ray's validators accept cluster.yaml, with a head without GPU and GPU nodes of both
    markets."""
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


SPOT = ("available_node_types", "gpu.spot")


@pytest.mark.parametrize(
    ("mutate", "error"),
    [
        pytest.param(set_at("max_worker", to=8), jsonschema.ValidationError, id="misspelt key"),
        pytest.param(
            set_at(*SPOT, "resources", "GPU", to="1"),
            jsonschema.ValidationError,
            id="text, no number",
        ),
        pytest.param(set_at("head_node_type", to="haed"), ValueError, id="no such head"),
        pytest.param(set_at(*SPOT, "min_workers", to=9), ValueError, id="minimum over all limits"),
        pytest.param(
            set_at(*SPOT, "max_workers", to=-1), AssertionError, id="maximum under minimum"
        ),
    ],
)
def test_ray_refuses_a_planted_error(
    cluster: Config, mutate: Mutation, error: type[Exception]
) -> None:
    """The validators can fail: one of them refuses each of these mistakes."""
    mutate(cluster)

    with pytest.raises(error):
        validate_cluster(cluster)


def test_spot_is_taken_before_on_demand(cluster: Config) -> None:
    """Both of Ray's autoscalers fill the spot type before they use the on-demand type."""
    demand = [{"GPU": 1, "CPU": 3}] * 10

    types = validate_cluster(cluster)
    chosen = RAY.choose_nodes(cluster["available_node_types"], "head", 10, demand)

    assert types["gpu.spot"].priority > types["gpu.ondemand"].priority
    assert types["gpu.spot.4"].priority > types["gpu.ondemand.4"].priority
    assert chosen == {"gpu.spot": 8, "gpu.ondemand": 2}


@pytest.mark.cluster
def test_nodes_of_four_gpus_are_for_more_than_single_ones_give(cluster: Config) -> None:
    """Nodes with four GPUs, spot first, are used once the single ones are at their limits."""
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
    """Return the environment of a process on a node, from the set-up command and .env.example."""
    (write,) = (command for command in cluster["setup_commands"] if command.startswith("cat >"))
    (tmp_path / "comfy-restore.env").write_text((ROOT / ".env.example").read_text())
    # Ray's launcher sets OMP_NUM_THREADS.
    environ = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    script = f"({write}) && . ~/comfy-restore.sh && env -0"
    done = subprocess.run(["bash", "-ec", script], env=environ, capture_output=True, check=True)
    lines = done.stdout.decode().split("\0")
    return dict(line.split("=", 1) for line in lines if line)


def test_nodes_have_the_environment_that_we_need(node_environ: Mapping[str, str]) -> None:
    """The file that set-up writes has our settings and Ray's, and no thread limit."""
    settings = load_settings(node_environ)

    assert settings.engine_variant == "cuda"
    assert settings.s3_access_key is None  # the instance profile is used instead
    assert node_environ["RAY_AUTH_MODE"] == "token"
    assert node_environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    local = LOCAL_ENVIRONMENT | LOCAL_DEFAULTS
    as_here = local.keys() - {"RAY_USAGE_STATS_ENABLED"}
    assert {name: node_environ[name] for name in as_here} == {name: local[name] for name in as_here}
    haproxy = Path(node_environ["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert haproxy == Path(node_environ["HOME"]) / "comfy-restore" / "bin" / PROGRAM
    assert node_environ["PATH"].startswith(f"{node_environ['HOME']}/comfy-restore/bin:")
    assert "OMP_NUM_THREADS" not in node_environ


def test_every_start_command_has_that_environment(cluster: Config) -> None:
    """Every Ray process starts with token authentication and our settings."""
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]

    assert all(command.startswith(". ~/comfy-restore.sh && ") for command in starts)
    assert "ray start --head" in " ".join(cluster["head_start_ray_commands"])
    assert cluster["head_start_ray_commands"][-1].endswith("serve deploy ~/serve_config.yaml")


def test_gpu_nodes_wait_for_their_head(cluster: Config) -> None:
    """They wait for longer than it takes to notice the loss of the head and to restart it."""
    [start] = [line for line in cluster["worker_start_ray_commands"] if "ray start" in line]

    assert "RAY_gcs_rpc_server_reconnect_timeout_s=600 ray start" in start


def test_nodes_get_this_release(cluster: Config) -> None:
    """The mounted and installed wheel is the one that pyproject.toml names."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    wheel = f"comfy_restore-{version}-py3-none-any.whl"

    assert cluster["file_mounts"][f"~/{wheel}"] == f"dist/{wheel}"
    assert f"file:///home/{cluster['auth']['ssh_user']}/{wheel}" in " ".join(commands(cluster))
    for local in ("serve_config.yaml", "requirements.lock"):
        assert (ROOT / cluster["file_mounts"][f"~/{local}"]).is_file()


def test_a_worker_fits_each_gpu_node(cluster: Config, serve_config: Config) -> None:
    """Every GPU node type has room for a worker, and the fleet has room for all workers."""
    args = validate_serve(serve_config)
    types = gpu_types(cluster)

    for kind in types.values():
        assert kind["resources"]["GPU"] >= args.worker_gpus
        assert kind["resources"]["CPU"] >= args.worker_cpus
    gpus_per_node = min(kind["resources"]["GPU"] for kind in types.values())
    assert args.workers_max * args.worker_gpus <= cluster["max_workers"] * gpus_per_node


@pytest.mark.exposure
def test_the_cluster_opens_two_ports_to_others(cluster: Config, serve_config: Config) -> None:
    """The rules that `ray up` writes allow everything between the nodes, HTTP from the VPC with the
    load balancer, and SSH by key, which Ray opens itself."""
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


@pytest.mark.exposure
def test_the_cluster_asks_for_tokens_and_hides_its_dashboard(cluster: Config) -> None:
    """Ray's own ports require its token; its dashboard listens on the head's loopback."""
    [profile] = [each for each in cluster["setup_commands"] if "comfy-restore.sh" in each]
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]

    assert "export RAY_AUTH_MODE=token\n" in profile
    assert "chmod 600 ~/comfy-restore.env ~/.ray/auth_token" in cluster["setup_commands"]
    assert all(". ~/comfy-restore.sh &&" in each for each in starts)
    [head] = [each for each in starts if "ray start --head" in each]
    assert "--dashboard-host=127.0.0.1" in head
