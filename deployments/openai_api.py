"""An OpenAI-compatible service: `serve run deployments.openai_api:build_app model=PATH [argument=value …]`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import click
import ray
from ray import serve

from deployments.api import api_deployment
from deployments.config import ApiConfig, ServedModel, read_arguments
from deployments.engine import ENGINE, engine_deployment
from rayllm.checkpoint.sources import ModelSource, resolve_model
from rayllm.config import EngineConfig
from rayllm.engine import placement, ray_private
from rayllm.errors import UsageError
from rayllm.frontend.chat import with_chat_template_read
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
    return bind(*find_models(*read_arguments(arguments)))


def find_models(api: ApiConfig, given: list[ServedModel]) -> tuple[ApiConfig, list[tuple[ServedModel, ModelSource]]]:
    """The arguments with all files read that they name, and the models found; asks no Ray. Raises `UsageError`."""
    api = api.with_keys_read()
    models = [(with_chat_template_read(model), resolve_model(model.model, model.load_format)) for model in given]
    for model, source in models:
        model.check_model(source.config)
        load_tokenizer(model, source)
    return api, models


def bind(api: ApiConfig, found: list[tuple[ServedModel, ModelSource]]) -> serve.Application:
    """The application of what `find_models` found. Raises `UsageError`, also for what the cluster can never hold."""
    models: list[tuple[ServedModel, EngineConfig, ModelSource]] = []
    engines, bundles = [], []
    with _cluster_in_view():
        for model, source in found:
            config = model.resolve(source.config, placement.choose_device(model.device))
            own = placement.bundles_of(config.tensor_parallel_size, config.device)
            strategy = placement.feasible_strategy(own, model.num_replicas, "num_replicas")
            name = ENGINE if len(found) == 1 else f"{ENGINE}-{model.name}"
            models.append((model, config, source))
            engines.append(engine_deployment(model, config, source, name, strategy, api))
            bundles += own * model.num_replicas
        if len(found) > 1:
            placement.check_room(bundles)
    return api_deployment(api, models, engines)


@contextlib.contextmanager
def _cluster_in_view() -> Iterator[None]:
    """Connected meanwhile to the cluster that will serve, if there is one: `serve run` asks for the application before
    it connects itself, or starts a Ray on this machine."""
    if ray.is_initialized():
        yield
        return
    context = click.get_current_context(silent=True)
    address = (context.params.get("address") if context else None) or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        placement.connect(address, min_cpus=1)
    except UsageError:
        if address != "auto":
            raise
    try:
        yield
    finally:
        ray.shutdown()
