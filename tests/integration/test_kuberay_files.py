"""deploy/kuberay, without a Kubernetes: by Ray's own reader of RayClusters and Serve's schema.

No package has the schema of KubeRay's resources, so their fields are held against the part of
the manifest that Ray reads, and what the files say of each other.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

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
    """The RayCluster that the operator makes of it."""
    metadata = {"name": "comfy-restore", "namespace": "comfy-restore"}
    return {"metadata": metadata, "spec": service["spec"]["rayClusterConfig"]}


def autoscaling(ray_cluster: Config) -> Config:
    """What Ray's autoscaler makes of a RayCluster, validated as it does."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    derive = autoscaling_config._derive_autoscaling_config_from_ray_cr
    config: Config = derive(copy.deepcopy(ray_cluster))
    return config


def test_01_ray_reads_the_cluster(ray_cluster: Config) -> None:
    """Ray's autoscaler finds a head that takes no work, and GPU nodes of two sizes and markets."""
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


@pytest.mark.parametrize(
    ("group", "key", "wrong", "error"),
    [
        pytest.param(0, "maxReplicas", "8", TypeError, id="text, no number"),
        pytest.param(0, "template", {}, KeyError, id="no pod"),
        pytest.param(2, "rayStartParams", {"num-cpus": "many"}, ValueError, id="no number"),
    ],
)
def test_01_ray_refuses_a_planted_error(
    ray_cluster: Config, group: int, key: str, wrong: object, error: type[Exception]
) -> None:
    """The reading above can fail: Ray refuses each of these mistakes."""
    ray_cluster["spec"]["workerGroupSpecs"][group][key] = wrong

    with pytest.raises(error):
        autoscaling(ray_cluster)


def test_01_serve_gets_the_configuration_of_the_repository(service: Config) -> None:
    """The service on Kubernetes is that of serve_config.yaml, in every figure, and Serve takes
    it."""
    embedded = yaml.safe_load(service["spec"]["serveConfigV2"])

    assert embedded == yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    [application] = ServeDeploySchema.model_validate(embedded).applications
    assert application.external_scaler_enabled


def test_01_the_fleet_has_room_for_every_worker(ray_cluster: Config, service: Config) -> None:
    """A worker fits each group's pod, and all workers together fit the spot groups alone."""
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


def test_01_versions_are_those_of_the_release(service: Config) -> None:
    """Ray and the wheel are the ones that pyproject.toml names."""
    project = (ROOT / "pyproject.toml").read_text()
    [ray] = re.findall(r"ray\[serve\]==([0-9.]+)", project)
    [release] = re.findall(r'^version = "([0-9.]+)"', project, re.MULTILINE)
    dockerfile = (KUBERAY / "Dockerfile").read_text()
    [overlay] = _documents(OVERLAY / "kustomization.yaml")

    assert service["spec"]["rayClusterConfig"]["rayVersion"] == ray
    assert f"rayproject/ray:{ray}-" in dockerfile
    assert set(re.findall(r"comfy_restore-([0-9.]+)-py3", dockerfile)) == {release}
    assert {image["newTag"] for image in overlay["images"]} == {release}


def test_01_pods_have_the_environment_of_the_nodes(service: Config) -> None:
    """Ray's and glibc's variables are those of cluster.yaml, but for the token, the operator's."""
    written = dict(
        re.findall(r"export ((?:RAY|MALLOC)_\w+)=(\S+)", (ROOT / "cluster.yaml").read_text())
    )
    assert written.pop("RAY_AUTH_MODE") == "token"

    for pod in _pods(service):
        for container in pod["containers"]:
            assert {each["name"]: each["value"] for each in container["env"]} == written
            assert container["envFrom"] == [{"secretRef": {"name": "comfy-restore"}}]


def _pods(service: Config) -> Iterator[Config]:
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


@pytest.mark.parametrize("folder", [KUBERAY / "base", OVERLAY], ids=["base", "aws"])
def test_01_a_kustomization_names_what_is_there(folder: Path) -> None:
    """Each file of the folder is used, each that is named exists, and each patch has a target."""
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


def test_01_every_image_is_replaced_by_the_overlay(service: Config) -> None:
    """The base's image names are placeholders, and kustomize is told where they stand."""
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
