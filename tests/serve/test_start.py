"""Starts that cannot work: each ends within seconds, with one line, as early as it can be known."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.util.placement_group import placement_group, remove_placement_group

from deployments.openai_api import build, build_app
from deployments.startup import read_failure
from rayllm.engine import ray_private
from rayllm.errors import UsageError
from serve.serve_testing import eventually, free_port

SERVE_RUN = ["-c", "from ray.serve.scripts import cli; cli()", "run", "deployments.openai_api:build_app"]


@pytest.fixture
def full_cluster(host: str) -> Iterator[str]:
    """The address of the tests' cluster, whose CPUs are all taken."""
    free = int(ray.available_resources()["CPU"])
    group = placement_group([{"CPU": 1}] * free)
    assert group.wait(30)
    yield ray.get_runtime_context().gcs_address
    remove_placement_group(group)


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | variables
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=90, env=environment)


def gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def test_what_the_cluster_can_never_hold(host: str, tiny_model: dict[str, Any]):
    """One model's engines, or several models together; more than there is may wait, not more than there can be."""
    quick = tiny_model | {"device": "cpu"}
    start = time.monotonic()
    for arguments, message in (
        ({"num_replicas": 17}, "17 engines of tensor_parallel_size=1 need 17 CPU, but the cluster has 16 CPU and "),
        ({"num_replicas": 9, "tensor_parallel_size": 2}, "lower num_replicas, tensor_parallel_size or add nodes"),
    ):
        with pytest.raises(UsageError, match=message):
            build(quick | arguments)
    models = [quick | {"num_replicas": 9, "served_model_name": name} for name in "ab"]
    with pytest.raises(UsageError, match=r"^the models need 18 CPU, but the cluster has 16 CPU and nothing can add"):
        build({"models": models})
    build(quick | {"num_replicas": 16, "max_replicas": 20})
    if not gpus():
        with pytest.raises(
            UsageError, match=r"^device=cuda needs 1 GPU \+ 1 CPU, .*: use device=cpu or add nodes$"
        ) as no:
            build(quick | {"device": "cuda"})
        assert no.value.param == "device"
    assert time.monotonic() - start < 30


def test_serve_deploy_is_told(host: str, tiny_model: dict[str, Any]):
    """It builds the application in a task, whose error stands in the application's status."""
    arguments = tiny_model | {"device": "cpu", "num_replicas": 17}
    with pytest.raises(ray.exceptions.RayTaskError, match=r"UsageError: 17 engines of .* need 17 CPU, but the cluster"):
        ray.get(ray.remote(num_cpus=0)(build_app).remote(arguments))


def test_resources_that_stay_taken(full_cluster: str, tiny_model: dict[str, Any]):
    app = build(tiny_model | {"device": "cpu", "placement_timeout_s": 1})
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        serve.run(app, name="placeless", route_prefix="/placeless")
    assert time.monotonic() - start < 60
    message = (
        "tensor_parallel_size=1 needs 1 CPU, but after 1 s only 0 CPU of the cluster's 16 CPU are free: free or add"
    )
    state = serve.status().applications["placeless"]
    serve.delete("placeless", _blocking=False)  # Serve waits for the replica that it cannot place
    assert any(f"UsageError: {message}" in deployment.message for deployment in state.deployments.values())
    assert isinstance(told := read_failure("placeless"), UsageError)
    assert str(told).startswith(message)


@pytest.mark.slow
def test_serve_run_refuses_in_one_line(host: str, tiny_model: dict[str, Any], tmp_path: Path):
    """What the cluster lacks, and what is wrong with files."""
    address = ray.get_runtime_context().gcs_address
    model = [f"{name}={value}" for name, value in tiny_model.items()]
    for arguments, message in (
        (["device=cpu", "num_replicas=17"], "17 engines of tensor_parallel_size=1 need 17 CPU, but"),
        (
            ["chat_template=nowhere.jinja"],
            "chat_template must be a Jinja file or a template, and 'nowhere.jinja' cannot",
        ),
    ):
        ended = run(*SERVE_RUN, "--address", address, *model, *arguments)
        assert ended.returncode == 2, ended.stderr
        [line] = [line for line in ended.stderr.splitlines() if "scripts.py" not in line]
        assert line.startswith(f"Error: {message}")


def refusal(*arguments: str, **variables: str) -> str:
    """The line with which `rayllm serve` ends."""
    ended = run("-m", "rayllm", "serve", *arguments, **variables)
    assert ended.returncode == 2, ended.stderr
    line = ended.stderr.rpartition("\r")[2].splitlines()[-1].strip()
    assert line.startswith("Error: ")
    assert "Traceback" not in ended.stderr
    return line.removeprefix("Error: ")


@pytest.mark.slow
def test_rayllm_serve_refuses_without_ray(smollm2: Path, tiny_text_model: Path, tmp_path: Path):
    """What is wrong with model, tokenizer, template and keys is known before Ray starts."""
    (tmp_path / "wrong.jinja").write_text("{% if %}")
    (tmp_path / "config.json").write_text("{}")
    (folder := tmp_path / "ray").mkdir()
    tokenizer = ["--tokenizer", str(smollm2)]
    for arguments, message in (
        (["nowhere.gguf"], "no file nowhere.gguf"),
        (
            [str(smollm2), "--tensor-parallel-size", "2"],
            "tensor_parallel_size 2 cannot split 9 query heads, 3 KV heads",
        ),
        ([str(tiny_text_model)], f"{tiny_text_model} has no tokenizer: name one"),
        ([str(tiny_text_model), "--tokenizer", str(tmp_path)], "no tokenizer at "),
        (
            [str(smollm2), "--chat-template", str(tmp_path / "wrong.jinja")],
            "chat_template is not valid Jinja (line 1: ",
        ),
        ([str(smollm2), "--api-keys-file", "nowhere"], "api_keys_file 'nowhere' cannot be read: No such file"),
        ([str(tiny_text_model), *tokenizer, "--allowed-origins", "a.example"], "allowed_origins must be * or origins"),
    ):
        assert refusal(*arguments, "--port", str(free_port()), RAY_TMPDIR=str(folder)).startswith(message)
    assert not list(folder.iterdir()), "Ray was started"


@pytest.mark.slow
def test_rayllm_serve_says_what_the_cluster_lacks(full_cluster: str, tiny_text_model: Path, smollm2: Path):
    port = str(ray_private.serve_http_options()[1])
    command = [str(tiny_text_model), "--tokenizer", str(smollm2), "--port", port, "--address", full_cluster]
    start = time.monotonic()
    never = refusal(*command, "--device", "cpu", "--num-replicas", "17")
    assert never.startswith("17 engines of tensor_parallel_size=1 need 17 CPU, but the cluster has 16 CPU and nothing")
    taken = refusal(*command, "--device", "cpu", "--placement-timeout-s", "2")
    assert taken.startswith("tensor_parallel_size=1 needs 1 CPU, but after 2 s only 0 CPU of the cluster's 16 CPU are")
    if not gpus():
        none = refusal(*command, "--device", "cuda")
        assert none.startswith(
            "device=cuda needs 1 GPU + 1 CPU, but the cluster has 0 GPU + 16 CPU and nothing can add"
        )
    assert time.monotonic() - start < 120
    eventually(lambda: "rayllm" not in serve.status().applications, 90, "the application to be gone")
