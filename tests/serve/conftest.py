"""A Ray of its own with Serve, and applications on it that tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from deployments.openai_api import build
from serve.serve_testing import Service, eventually, free_port


@pytest.fixture(scope="package")
def host() -> Iterator[str]:
    """Where Serve listens."""
    ray.init("local", num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def deployer(host: str) -> Iterator[Callable[..., Service]]:
    """Runs applications of these arguments; at the end they are gone."""
    names = set()

    def run(name: str, **arguments: Any) -> Service:
        names.add(name)
        device = {} if "models" in arguments else {"device": "cpu"}
        serve.run(build(device | arguments), name=name, route_prefix=f"/{name}")
        service = Service(f"{host}/{name}", name)
        eventually(lambda: service.http.get("/health").status_code == 200, 10, "the service to be healthy")
        return service

    yield run
    for name in names:
        serve.delete(name)


@pytest.fixture(scope="module")
def deploy(host: str) -> Iterator[Callable[..., Service]]:
    """Deploys the applications of one module."""
    yield from deployer(host)


@pytest.fixture(scope="package")
def deploy_shared(host: str) -> Iterator[Callable[..., Service]]:
    yield from deployer(host)


@pytest.fixture(scope="package")
def smol(deploy_shared: Callable[..., Service], smollm2: Path) -> Service:
    """Serves a model that can write, as "smol"."""
    arguments = {"max_model_len": 512, "block_size": 16, "max_num_seqs": 16}
    return deploy_shared("smol", model=str(smollm2), served_model_name="smol", **arguments)


@pytest.fixture(scope="package")
def tiny_model(smollm2: Path, tiny_text_model: Path) -> dict[str, Any]:
    """Arguments of engines of a quick model, "org/tiny"."""
    names = {"model": str(tiny_text_model), "tokenizer": str(smollm2), "served_model_name": "org/tiny"}
    return names | {"block_size": 16}


@pytest.fixture(scope="package")
def tiny(deploy_shared: Callable[..., Service], tiny_model: dict[str, Any]) -> Service:
    """Serves the quick model."""
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "num_gpu_blocks_override": 1024}
    return deploy_shared("tiny", **tiny_model, **limits)
