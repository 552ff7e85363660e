"""An OpenAI-compatible service: `serve run deployments.openai_api:build_app model=PATH [argument=value …]`."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

import click
import ray
from ray import serve
from ray._private.accelerators import get_accelerator_manager_for_resource

from deployments.api import api_deployment
from deployments.config import ApiConfig, ServedModel, read_arguments
from deployments.engine import engine_deployment
from rayllm.checkpoint.sources import ModelSource, resolve_model
from rayllm.engine import placement
from rayllm.errors import UsageError
from rayllm.frontend.tokenizer import load_tokenizer


def build_app(arguments: dict[str, Any]) -> serve.Application:
    """The application of these arguments, see `deployments.config`.

    What is wrong with them ends `serve run` with one line and exit code 2; within Ray (`serve deploy`) it is raised.
    """
    try:
        return build(arguments)
    except UsageError as error:
        if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def build(arguments: dict[str, Any]) -> serve.Application:
    """As `build_app`, but raises `UsageError`."""
    return bind(*find_models(arguments))


def find_models(arguments: dict[str, Any]) -> tuple[ApiConfig, list[tuple[ServedModel, ModelSource]]]:
    """What the arguments say, all models and tokenizers found; asks no Ray. Raises `UsageError`."""
    api, given = read_arguments(arguments)
    models = [(model, resolve_model(model.model, model.load_format)) for model in given]
    for model, source in models:
        source.config.check_tensor_parallel(model.tensor_parallel_size)
        load_tokenizer(model, source)
    return api, models


def bind(api: ApiConfig, found: list[tuple[ServedModel, ModelSource]]) -> serve.Application:
    """The application of what `find_models` found. Raises `UsageError`."""
    device = None
    models: list[tuple[ServedModel, ModelSource]] = []
    engines = []
    for model, source in found:
        if model.device == "auto" and device is None:
            device = _device_of_cluster()
        decided = model.resolved(
            device=device if device and model.device == "auto" else model.device,
            model_dtype=source.config.dtype,
            model_max_len=source.config.max_model_len,
            model_kv_heads=source.config.num_key_value_heads,
        )
        name = "Engine" if len(found) == 1 else f"Engine-{decided.name}"
        models.append((decided, source))
        engines.append(engine_deployment(decided, source, name, api))
    return api_deployment(api, models, engines)


def _device_of_cluster() -> Literal["cpu", "cuda"]:
    """What engines of the cluster run on where the arguments do not say: `serve run` asks before it connects to it."""
    if ray.is_initialized():
        return placement.choose_device("auto")
    context = click.get_current_context(silent=True)
    address = (context.params.get("address") if context else None) or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        placement.connect(address, min_cpus=1)
    except UsageError:
        if address != "auto":
            raise
        # there is no cluster yet: `serve run` will start one on this machine
        return "cuda" if get_accelerator_manager_for_resource("GPU").get_current_node_num_accelerators() else "cpu"
    try:
        return placement.choose_device("auto")
    finally:
        ray.shutdown()
