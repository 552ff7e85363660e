"""An OpenAI-compatible service: `serve run deployments.openai_api:build_app model=PATH [argument=value …]`."""

from __future__ import annotations

import os
import sys
from typing import Any

import click
import ray
from ray import serve

from deployments.api import api_deployment
from deployments.config import ApiConfig, ServedModel, read_arguments
from deployments.engine import engine_deployment
from rayllm.checkpoint.sources import ModelSource, resolve_model
from rayllm.config import DeviceName, EngineConfig
from rayllm.engine import placement, ray_private
from rayllm.errors import UsageError
from rayllm.frontend.tokenizer import load_tokenizer


def build_app(arguments: dict[str, Any]) -> serve.Application:
    """The application of these arguments, see `deployments.config`.

    What is wrong with them ends `serve run` with one line and exit code 2; within Ray (`serve deploy`) it is raised.
    """
    try:
        return build(arguments)
    except UsageError as error:
        if ray.is_initialized() and ray_private.is_worker():
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application of these arguments. Raises `UsageError`."""
    return bind(*find_models(arguments))


def find_models(arguments: dict[str, Any]) -> tuple[ApiConfig, list[tuple[ServedModel, ModelSource]]]:
    """What the arguments say, all models and tokenizers found; asks no Ray. Raises `UsageError`."""
    api, given = read_arguments(arguments)
    models = [(model, resolve_model(model.model, model.load_format)) for model in given]
    for model, source in models:
        model.check_model(source.config)
        load_tokenizer(model, source)
    return api, models


def bind(api: ApiConfig, found: list[tuple[ServedModel, ModelSource]]) -> serve.Application:
    """The application of what `find_models` found. Raises `UsageError`."""
    device: DeviceName = "cpu"  # of models that leave it open
    if any(model.device == "auto" for model, _ in found):
        device = _device_of_cluster()
    models: list[tuple[ServedModel, EngineConfig, ModelSource]] = []
    engines = []
    for model, source in found:
        config = model.resolve(source.config, device if model.device == "auto" else model.device)
        name = "Engine" if len(found) == 1 else f"Engine-{model.name}"
        models.append((model, config, source))
        engines.append(engine_deployment(model, config, source, name, api))
    return api_deployment(api, models, engines)


def _device_of_cluster() -> DeviceName:
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
        return "cuda" if ray_private.count_gpus_here() else "cpu"
    try:
        return placement.choose_device("auto")
    finally:
        ray.shutdown()
