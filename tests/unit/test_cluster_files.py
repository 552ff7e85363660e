"""The files for clusters are what Ray and Kubernetes take."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from deployments.config import read_arguments

ROOT = Path(__file__).parents[2]
RAYLLM = f"rayllm[batch,flash]=={version('rayllm')}"


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster-onprem.yaml"])
def test_launcher_files(name: str):
    """As `ray up` checks them; the token is on every node before anything starts there."""
    config = yaml.safe_load((ROOT / name).read_text())
    validate_config(prepare_config(config))
    assert RAYLLM in " ".join(config["setup_commands"])
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "RAY_AUTH_MODE=token" in " ".join(config["setup_commands"])


def test_onprem_workers_come_and_go():
    config = prepare_config(yaml.safe_load((ROOT / "cluster-onprem.yaml").read_text()))
    [node_type] = config["available_node_types"].values()
    assert (node_type["min_workers"], node_type["max_workers"]) == (0, 2)


def check_serve_config(text: str, host: str) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert config.http_options.host == host
    for application in config.applications:
        assert application.import_path == "deployments.openai_api:build_app"
        api, _ = read_arguments(application.args)
        assert api.api_keys or host == "127.0.0.1", "open to the network, and to everybody on it"


def test_serve_yaml():
    check_serve_config((ROOT / "deployments" / "serve.yaml").read_text(), "127.0.0.1")


# Fields of KubeRay's RayService (ray.io/v1) that the manifest may use; pods have Kubernetes' own schema.
SERVICE_FIELDS = {"serveConfigV2": str, "rayClusterConfig": dict}
CLUSTER_FIELDS = {
    "rayVersion": str,
    "authOptions": dict,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": dict,
    "headGroupSpec": dict,
    "workerGroupSpecs": list,
}
GROUP_FIELDS = {"rayStartParams": dict, "template": dict}
WORKER_FIELDS = GROUP_FIELDS | {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}


def check_fields(value: dict[str, Any], fields: dict[str, type]) -> None:
    assert {name: type(item) for name, item in value.items()} == fields


def test_rayservice_yaml():
    text = (ROOT / "deployments" / "rayservice.yaml").read_text()
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    check_fields(manifest["spec"], SERVICE_FIELDS)
    check_serve_config(manifest["spec"]["serveConfigV2"], "0.0.0.0")
    cluster = manifest["spec"]["rayClusterConfig"]
    check_fields(cluster, CLUSTER_FIELDS)
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token", "secretName": "rayllm-token"}
    assert "kubectl create secret generic rayllm-token --from-literal=auth_token=" in text
    assert RAYLLM in text

    head, [worker] = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    check_fields(head, GROUP_FIELDS)
    check_fields(worker, WORKER_FIELDS)
    assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
    containers = []
    for group in (head, worker):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "rayllm"}} | group["template"]
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        [container] = group["template"]["spec"]["containers"]
        containers.append(container)
        assert container["resources"]["requests"] == container["resources"]["limits"], "as Ray counts them"
    assert containers[0]["image"] == containers[1]["image"]
    assert "nvidia.com/gpu" not in containers[0]["resources"]["limits"]
    assert "nvidia.com/gpu" in containers[1]["resources"]["limits"]
