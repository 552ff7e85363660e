"""What rayllm uses of Ray's private parts, one test for each contract, called like the function that relies on it.

`read_autoscaler_file` and `has_autoscaler_elsewhere` are tried on a growing cluster in tests/engine/test_placement.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import ray
from ray import serve

from rayllm.engine import ray_private
from serve.serve_testing import free_port


@pytest.fixture
def gcs_address(host: str) -> str:
    address: str = ray.get_runtime_context().gcs_address
    return address


def test_cluster_at(gcs_address: str, monkeypatch: pytest.MonkeyPatch):
    assert ray_private.cluster_at(gcs_address) == gcs_address
    monkeypatch.setenv("RAY_ADDRESS", gcs_address)
    assert ray_private.cluster_at("auto") == gcs_address
    with pytest.raises((ConnectionError, ValueError, OSError)):
        ray_private.cluster_at("127.0.0.1")


def test_ask(gcs_address: str):
    assert ray_private.ask(gcs_address, timeout_s=10) in (grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED)
    assert ray_private.ask(f"127.0.0.1:{free_port()}", timeout_s=10) == grpc.StatusCode.UNAVAILABLE


def test_without_uv_run(tmp_path: Path):
    """A Ray starts in a folder that it would not upload, under a process that looks like uv's."""
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(600 << 20)
    code = (
        "import ray, rayllm.engine.placement as p; p.connect('local', 1); print(ray.get_runtime_context().runtime_env)"
    )
    (tmp_path / "run").write_text(f'{sys.executable} -c "{code}"\n')
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    command = ["bash", "-c", "exec -a uv bash run"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("{}\n", "")


def test_is_client(host: str):
    assert not ray_private.is_client()


def test_is_worker(host: str):
    assert not ray_private.is_worker()
    assert ray.get(ray.remote(ray_private.is_worker).remote())


def test_count_gpus_here():
    assert (ray_private.count_gpus_here() > 0) == Path("/dev/nvidiactl").exists()


def test_kv(host: str):
    assert ray_private.kv_get(b"test", "name") is None
    for value in (b"old", b"new"):
        ray.get(ray.remote(ray_private.kv_put).remote(b"test", "name", value))
    assert ray_private.kv_get(b"test", "name") == b"new"
    assert ray_private.kv_get(b"other", "name") is None


def test_read_autoscaler_file(host: str):
    assert ray_private.read_autoscaler_file(timeout_s=30) == "", "a monitor that has nothing to scale"


def test_serve_http_options(host: str):
    name, port = ray_private.serve_http_options()
    assert f"http://{name}:{port}" == host


def test_log_folder(host: str):
    assert list((ray_private.log_folder() / "serve").glob("proxy_*.log"))


def test_count_serve_places(host: str):
    """Groups that Ray has placed, not those that wait, nor of deployments whose names only begin alike."""

    class Nothing:
        pass

    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "placement_group_bundles": [{"CPU": 0.01}]}
    placed = serve.deployment(Nothing, name="Placed", num_replicas=2, **options)
    serve.run(placed.bind(), name="places", route_prefix=None)
    assert ray_private.count_serve_places("places", "Placed") == 2
    assert ray_private.count_serve_places("places", "Place") == 0
    assert ray_private.count_serve_places("place", "Placed") == 0
    never = serve.deployment(Nothing, name="Never", **options | {"placement_group_bundles": [{"CPU": 1000}]})
    serve.run_many(
        [serve.RunTarget(never.bind(), name="never", route_prefix=None)], wait_for_applications_running=False
    )
    time.sleep(2)
    assert ray_private.count_serve_places("never", "Never") == 0
    serve.delete("places")
    serve.delete("never", _blocking=False)


def test_serve_request_id(host: str):
    class Echo:
        async def __call__(self, request: object = None) -> str:
            return ray_private.serve_request_id()

    deployment = serve.deployment(Echo, ray_actor_options={"num_cpus": 0})
    handle = serve.run(deployment.bind(), name="request", route_prefix="/request")
    ids = {handle.remote().result(timeout_s=30) for _ in range(3)}
    assert len(ids) == 3 and "" not in ids
    assert httpx.get(f"{host}/request", headers={"x-request-id": "r-1"}, timeout=30).text == "r-1"
    serve.delete("request")


def test_serve_session_id(host: str):
    """By a handle's option, and by HTTP's header; nothing without them."""

    class Echo:
        async def __call__(self, request: object = None) -> str:
            return ray_private.serve_session_id()

    deployment = serve.deployment(Echo, ray_actor_options={"num_cpus": 0})
    handle = serve.run(deployment.bind(), name="session", route_prefix="/session")
    assert handle.remote().result(timeout_s=30) == ""
    assert handle.options(session_id="alice").remote().result(timeout_s=30) == "alice"
    assert httpx.get(f"{host}/session", headers={"x-session-id": "bob"}, timeout=30).text == "bob"
    serve.delete("session")
