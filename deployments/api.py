"""The Api deployment: the ingress. Serves HTTP, tokenises and detokenises; needs no GPU."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.responses import Response

from deployments.config import ApiConfig, ServedModel, scaling
from deployments.http import Endpoint, error_of, make_app
from deployments.link import ServeLink
from deployments.metrics import ServiceMetrics, engine_values, merged
from deployments.request_log import RequestLog
from deployments.service import Model, Service
from deployments.startup import failure_told, placing
from rayllm.checkpoint.sources import ModelSource
from rayllm.config import EngineConfig
from rayllm.engine import ray_private
from rayllm.engine.placement import local_host
from rayllm.errors import UsageError
from rayllm.frontend.aside import aside
from rayllm.frontend.client import Client, Prompt
from rayllm.frontend.output import Increment, joined
from rayllm.frontend.tokenizer import load_tokenizer

API = "Api"
PLACING_POLL_S = 0.5


class ApiReplica:
    """One process of the ingress. Its methods are also what Python handles call."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: ApiConfig,
        models: list[tuple[ServedModel, EngineConfig, ModelSource]],
        engines: list[DeploymentHandle],
    ):
        self.config = config
        self.metrics = ServiceMetrics()
        self._log = RequestLog(config.log_requests)
        self._links: dict[str, ServeLink] = {}
        self._texts: dict[str, str] = {}
        """The last metrics of every Api process: a sum must not fall when one is late."""
        with failure_told(serve.get_replica_context().app_name):
            self.service = Service(await self._connect(models, engines), self.metrics)

    async def _connect(
        self, models: list[tuple[ServedModel, EngineConfig, ModelSource]], engines: list[DeploymentHandle]
    ) -> list[Model]:
        served = []
        app = serve.get_replica_context().app_name
        for (model, engine_config, source), engine in zip(models, engines, strict=True):
            for _ in placing(app, engine.deployment_name, engine_config, num_engines=1):
                await asyncio.sleep(PLACING_POLL_S)
            link = self._links[model.name] = ServeLink(engine, self.config.recovery_timeout_s)
            here = await asyncio.to_thread(source.on_this_node, weights=False)
            tokenizer = await asyncio.to_thread(load_tokenizer, model, here)
            client = Client(link, engine_config, source.config, tokenizer, local_host())
            aliases = model.served_names[1:]
            served.append(Model(model.name, client, tokenizer, link, int(time.time()), aliases))
        return served

    def __serve_build_asgi_app__(self) -> Starlette:
        def observe(path: str, status: int) -> None:
            self.metrics.responses.add(1, path, str(status))

        page = Endpoint("GET", "/metrics", self._metrics_page, answer=None, is_probe=True)
        return make_app([*self.service.endpoints(), page], list(self.service.models), self.config, observe, self._log)

    async def _metrics_page(self, request_id: str) -> Response:
        """Shows the metrics of the whole application."""
        own = serve.get_deployment_handle(API, serve.get_replica_context().app_name)
        response: Any = own.broadcast("metrics_text")
        answers = await response.results_async(timeout_s=2, return_exceptions=True)
        self._texts |= {answer[0]: answer[1] for answer in answers if isinstance(answer, tuple)}
        engines = {
            name: {status.engine: engine_values(status.stats, status.num_blocks) for status in link.statuses}
            for name, link in self._links.items()
        }
        return Response(merged(self._texts.values(), engines), media_type="text/plain; version=0.0.4")

    async def metrics_text(self) -> tuple[str, str]:
        """This process's name, and its metrics in Prometheus' text format."""
        return serve.get_replica_context().replica_tag, self.metrics.text()

    async def is_ready(self) -> bool:
        """Whether this process knows of an engine for each model."""
        return not any(link.trouble for link in self._links.values())

    async def request_lines(self) -> list[str]:
        """With `log_requests`, what this process has to tell of requests since the last call."""
        return self._log.take()

    async def drain(self) -> int:
        """From now on, new requests are refused with 503; returns how many are still answered."""
        self.service.is_draining = True
        return self.service.num_running

    # ---- for Python handles

    async def generate(self, prompt: Prompt, model: str | None = None, **params: Any) -> dict[str, Any]:
        """The answer to a text, a list of token ids or a list of chat messages.

        `params` are the fields of `SamplingParams`; `model` may be left out if only one is served. The result has
        `text`, `token_ids`, `finish_reason`, `num_prompt_tokens` and `num_cached_tokens`, and with n > 1 all of them
        in `choices`. Raises `UsageError`, `QueueFullError` or `EngineDeadError`.
        """
        choices = [_as_dict(choice) for choice in await joined(self._answer("generate", prompt, model, params))]
        return choices[0] | ({"choices": choices} if len(choices) > 1 else {})

    async def stream(self, prompt: Prompt, model: str | None = None, **params: Any) -> AsyncIterator[dict[str, Any]]:
        """As `generate`, in increments as they come: call it with `handle.options(stream=True)`."""
        async for increment in self._answer("stream", prompt, model, params):
            yield _as_dict(increment)

    async def _answer(
        self, kind: str, prompt: Prompt, model: str | None, params: dict[str, Any]
    ) -> AsyncGenerator[Increment]:
        record = self._log.begin(ray_private.serve_request_id(), kind)
        status = 499  # unless it ends
        try:
            models = self.service.models
            name = next(iter(models)) if model is None and len(self._links) == 1 else model
            if name not in models:
                raise UsageError(f"model must be one of {', '.join(models)}, not {name!r}", "model")
            client = models[name].client
            sampling = client.sampling_params(params)
            token_ids = await aside(len(prompt), client.prepare, prompt, sampling)
            async with aclosing(self.service.generate(models[name], [token_ids], sampling)) as increments:
                async for increment in increments:
                    yield increment
            status = 200
        except Exception as error:
            status = error_of(error).status
            raise
        finally:
            self._log.end(record, status)


def _as_dict(increment: Increment) -> dict[str, Any]:
    fields = ("index", "text", "token_ids", "finish_reason", "stop_reason", "num_prompt_tokens", "num_cached_tokens")
    return {name: getattr(increment, name) for name in fields}


def api_deployment(
    config: ApiConfig, models: list[tuple[ServedModel, EngineConfig, ModelSource]], engines: list[serve.Application]
) -> serve.Application:
    """The ingress of an application, bound to its engines, one for each model."""
    deployment: Any = serve.deployment(
        serve.ingress()(ApiReplica),
        name=API,
        **scaling(config.api_replicas, config.max_api_replicas, config.api_target_ongoing_requests or 128, config),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1_000_000,  # engines bound their queues, and say so with 429
        health_check_period_s=1,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        max_constructor_retry_count=1,
    )
    return deployment.bind(config, models, engines)
