"""deploy/kuberay without a Kubernetes, checked with Ray's reader of RayClusters and Serve's schema.

No package has the schema of KubeRay's resources. So their fields are compared with the part of the
manifest that Ray reads, and with each other.
"""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from restoration.settings import NodeSettings, load_settings
from restoration.webhooks.urls import PUBLIC_PORTS
from serve_app.deployment import PoolArgs

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
OVERLAY = KUBERAY / "overlays" / "aws"
Config = dict[str, Any]


def _documents(path: Path) -> list[Config]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.fixture
def service() -> Config:
    [manifest] = _documents(KUBERAY / "base" / "rayservice.yaml")
    return manifest


@pytest.fixture
def ray_cluster(service: Config) -> Config:
    """Return the RayCluster that the operator creates from the service."""
    metadata = {"name": "comfy-restore", "namespace": "comfy-restore"}
    return {"metadata": metadata, "spec": service["spec"]["rayClusterConfig"]}


def autoscaling(ray_cluster: Config) -> Config:
    """Return the configuration that Ray's autoscaler derives from a RayCluster, after its
    validation."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    derive = autoscaling_config._derive_autoscaling_config_from_ray_cr
    config: Config = derive(copy.deepcopy(ray_cluster))
    return config


@pytest.mark.cluster
def test_ray_reads_the_cluster(ray_cluster: Config) -> None:
    """Ray's autoscaler finds a head without work, and GPU nodes of two sizes and two markets."""
    config = autoscaling(ray_cluster)
    types = config["available_node_types"]
    gpus = {name: kind["resources"].get("GPU", 0) for name, kind in types.items()}

    assert config["idle_timeout_minutes"] == 2
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    assert {name: count for name, count in gpus.items() if count} == {
        "gpu-ondemand": 1,
        "gpu-ondemand-4": 4,
        "gpu-spot": 1,
        "gpu-spot-4": 4,
    }
    assert {types[name]["min_workers"] for name in gpus} == {0}


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("group", "key", "wrong", "error"),
    [
        pytest.param(0, "maxReplicas", "8", TypeError, id="text, no number"),
        pytest.param(0, "template", {}, KeyError, id="no pod"),
        pytest.param(2, "rayStartParams", {"num-cpus": "many"}, ValueError, id="no number"),
    ],
)
def test_ray_refuses_a_planted_error(
    ray_cluster: Config, group: int, key: str, wrong: object, error: type[Exception]
) -> None:
    """The reader can fail: Ray refuses each of these mistakes."""
    ray_cluster["spec"]["workerGroupSpecs"][group][key] = wrong

    with pytest.raises(error):
        autoscaling(ray_cluster)


@pytest.mark.cluster
def test_serve_gets_the_configuration_of_the_repository(service: Config) -> None:
    """The embedded configuration equals serve_config.yaml, and Serve accepts it."""
    embedded = yaml.safe_load(service["spec"]["serveConfigV2"])

    assert embedded == yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    [application] = ServeDeploySchema.model_validate(embedded).applications
    assert application.external_scaler_enabled


@pytest.mark.cluster
def test_the_fleet_has_room_for_every_worker(ray_cluster: Config, service: Config) -> None:
    """Each group's pod has room for a worker, and the spot groups alone for all workers."""
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    args = PoolArgs.model_validate(application["args"])
    types = autoscaling(ray_cluster)["available_node_types"]
    spot = 0

    for name, kind in types.items():
        if not (gpus := kind["resources"].get("GPU", 0)):
            continue
        assert kind["resources"]["CPU"] >= gpus / args.worker_gpus * args.worker_cpus
        spot += gpus * kind["max_workers"] * name.startswith("gpu-spot")
    assert spot >= args.workers_max


@pytest.mark.cluster
def test_versions_are_those_of_the_release(service: Config) -> None:
    """The versions of Ray and of the wheel are those in pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text()
    [ray] = re.findall(r"ray\[serve\]==([0-9.]+)", project)
    [release] = re.findall(r'^version = "([0-9.]+)"', project, re.MULTILINE)
    dockerfile = (KUBERAY / "Dockerfile").read_text()
    [overlay] = _documents(OVERLAY / "kustomization.yaml")

    assert service["spec"]["rayClusterConfig"]["rayVersion"] == ray
    assert f"rayproject/ray:{ray}-" in dockerfile
    assert set(re.findall(r"comfy_restore-([0-9.]+)-py3", dockerfile)) == {release}
    assert {image["newName"].rpartition("/")[2] for image in overlay["images"]} == {
        "comfy-restore",
        "comfy-restore-gpu",
    }


def test_images_are_named_by_digest() -> None:
    """A tag that is pushed again changes neither the running images nor the Ray that they are built
    on."""
    [overlay] = _documents(OVERLAY / "kustomization.yaml")
    for image in overlay["images"]:
        assert "newTag" not in image
        assert re.fullmatch("sha256:[0-9a-f]{64}", image["digest"])
    dockerfile = (KUBERAY / "Dockerfile").read_text()
    [base] = [line for line in dockerfile.splitlines() if line.startswith("FROM rayproject/")]
    assert "@${RAY_DIGEST} AS head" in base
    assert "\nARG RAY_DIGEST\n" in dockerfile  # without a default, so that each build names it


@pytest.mark.cluster
def test_pods_have_the_environment_of_the_nodes(service: Config) -> None:
    """Ray's and glibc's variables are those of cluster.yaml, except for the token, which the
    operator sets, and for paths."""
    exported = re.findall(r"export ((?:RAY|MALLOC)_\w+)=(\S+)", (ROOT / "cluster.yaml").read_text())
    written = dict(exported)
    assert written.pop("RAY_AUTH_MODE") == "token"
    haproxy = written.pop("RAY_SERVE_HAPROXY_BINARY_PATH").strip('"')

    for pod in _pods(service):
        for container in pod["containers"]:
            found = {each["name"]: each["value"] for each in container["env"]}
            assert Path(found.pop("RAY_SERVE_HAPROXY_BINARY_PATH")).name == Path(haproxy).name
            assert found.pop("COMFY_RESTORE_STATE") in _writable(pod, container)
            assert found == written


def _writable(pod: Config, container: Config) -> dict[str, str]:
    """Return the writable folders of a container with their volumes."""
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    return {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}


def test_pods_can_do_no_more_than_they_must(service: Config) -> None:
    """Each container has an ordinary account, no way to gain privileges, a read-only image, and the
    container runtime's default system calls."""
    for pod in _pods(service):
        account = pod["securityContext"]
        assert account["runAsNonRoot"]
        assert account["runAsUser"] > 0
        assert account["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"/tmp", "/var/lib/comfy-restore"} <= _writable(pod, container).keys()  # noqa: S108
    autoscaler = service["spec"]["rayClusterConfig"]["autoscalerOptions"]["securityContext"]
    assert autoscaler["capabilities"] == {"drop": ["ALL"]}
    assert not autoscaler["allowPrivilegeEscalation"]


def test_gpu_pods_have_no_rights_in_kubernetes_and_lease_their_gpus(service: Config) -> None:
    """Their account's token is not mounted; the leases' folder is where the service expects it."""
    _, *gpu_pods = _pods(service)
    for pod in gpu_pods:
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            cache = NodeSettings.model_fields["cache_dir"].default
            home = Path("/home/ray")  # the home of the account in Ray's images
            slots = home / Path(cache).relative_to("~") / "slots"
            assert str(slots) in _writable(pod, container)


def test_gpu_pods_get_the_secrets_that_they_need(service: Config) -> None:
    """Their secret is cluster.env without the head's own secrets, and is sufficient to run."""
    [secret] = re.findall(
        r"^(grep .*) > worker\.env$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE
    )
    head, *gpu_pods = _pods(service)
    everything = "".join(
        f"{line.removeprefix('#')}\n"
        for line in (ROOT / ".env.example").read_text().splitlines()
        if re.match(r"#?[A-Z_0-9]+=", line)
    )
    kept = subprocess.run(
        ["bash", "-c", secret.replace(" cluster.env", "")],
        input=everything, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip

    names = {line.partition("=")[0] for line in kept.splitlines()}
    assert {"DATABASE_URL", "REDIS_URL", "S3_BUCKET", "AWS_SECRET_ACCESS_KEY"} <= names
    of_the_head = {"WEBHOOK_SECRET", "CLOUDFRONT_PRIVATE_KEY", "RAY_REDIS_PASSWORD"}
    assert not {name for name in names if name.removesuffix("_FILE") in of_the_head}
    load_settings(dict(line.split("=", 1) for line in kept.splitlines() if line[-1] != "="))
    for pod, name in (
        (head, "comfy-restore"),
        *((pod, "comfy-restore-worker") for pod in gpu_pods),
    ):
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            assert container["envFrom"] == [{"secretRef": {"name": name}}]


def test_pods_reach_what_they_need_and_no_metadata_of_the_cloud() -> None:
    """Egress is allowed to each other, DNS, Postgres, Redis and HTTPS; from the head also to
    webhooks."""
    policies = {each["metadata"]["name"]: each["spec"] for each in _network_policies()}
    everyone, head = policies["comfy-restore"], policies["comfy-restore-head"]
    assert everyone["policyTypes"] == ["Ingress", "Egress"]
    assert (
        everyone["podSelector"]["matchLabels"].items() < head["podSelector"]["matchLabels"].items()
    )
    assert head["podSelector"]["matchLabels"]["ray.io/node-type"] == "head"

    assert _ports(everyone["egress"]) == {53, 443, 5432, 6379}
    assert set(PUBLIC_PORTS) <= _ports(everyone["egress"]) | _ports(head["egress"])
    blocks = [
        peer["ipBlock"]
        for policy in policies.values()
        for rule in policy["egress"]
        for peer in rule["to"]
        if "ipBlock" in peer
    ]
    assert len(blocks) == 4
    for block in blocks:
        for metadata in ("169.254.169.254", "fd00:ec2::254"):
            if ip_address(metadata) in ip_network(block["cidr"]):
                excepted = map(ip_network, block["except"])
                assert any(ip_address(metadata) in network for network in excepted)


def test_only_http_is_reached_from_outside() -> None:
    """HAProxy's metrics and statistics and Ray's ports are reachable only between the pods."""
    policies = [each["spec"] for each in _network_policies()]
    open_to_all = [
        rule for policy in policies for rule in policy.get("ingress", []) if "from" not in rule
    ]
    assert _ports(open_to_all) == {8000}


def _network_policies() -> list[Config]:
    return _documents(KUBERAY / "base" / "network.yaml")


def _ports(rules: list[Config]) -> set[int]:
    return {port["port"] for rule in rules for port in rule.get("ports", [])}


def _pods(service: Config) -> Iterator[Config]:
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


@pytest.mark.cluster
@pytest.mark.parametrize("folder", [KUBERAY / "base", OVERLAY], ids=["base", "aws"])
def test_a_kustomization_names_what_is_there(folder: Path) -> None:
    """All files of the folder are used, all named files exist, and each patch has a target."""
    [kustomization] = _documents(folder / "kustomization.yaml")
    patches = [patch["path"] for patch in kustomization.get("patches", [])]
    named = kustomization["resources"] + patches + kustomization.get("configurations", [])

    assert all((folder / name).exists() for name in named)
    assert {path.name for path in folder.iterdir()} == {
        "kustomization.yaml",
        *(name for name in named if "/" not in name),
    }
    base = {
        (each["kind"], each["metadata"]["name"])
        for path in (KUBERAY / "base").glob("*.yaml")
        for each in _documents(path)
        if "metadata" in each
    }
    for patch in patches:
        for each in _documents(folder / patch):
            assert (each["kind"], each["metadata"]["name"]) in base


@pytest.mark.cluster
def test_every_image_is_replaced_by_the_overlay(service: Config) -> None:
    """The base's image names are placeholders, and kustomize knows all their places."""
    [overlay] = _documents(OVERLAY / "kustomization.yaml")
    pods = list(_pods(service))
    containers = [each for pod in pods for each in pod["containers"]]
    containers += [each for pod in pods for each in pod.get("initContainers", [])]
    [places] = _documents(KUBERAY / "base" / "images.yaml")

    assert {each["image"] for each in containers} == {each["name"] for each in overlay["images"]}
    found: list[str] = []
    for place in places["images"]:
        found += _at(service, place["path"].split("/"))
    assert sorted(found) == sorted(each["image"] for each in containers)


def _at(value: Any, path: list[str]) -> list[str]:
    if not path:
        return [value]
    key, rest = path[0], path[1:]
    if key.endswith("[]"):
        return [found for each in value.get(key[:-2], []) for found in _at(each, rest)]
    return _at(value[key], rest)
