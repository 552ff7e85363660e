"""The arguments of the service: those of each model it serves, and those of the application."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayllm.config import EngineConfig, Options, check_names, option
from rayllm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ServedModel(EngineConfig):
    """One model: its engine's arguments, and how it is served."""

    served_model_name: str | None = option(None, "the model's name in requests; default: that of its file or folder")
    num_replicas: int = option(1, "number of engines that serve the model")
    max_queued_requests: int = option(1024, "choices that may wait beyond the max_num_seqs that run; then 429")
    max_queued_tokens: int | None = option(
        None, "prompt tokens that may wait beyond what the KV cache holds; default: four times the cache; then 429"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.num_replicas >= 1, "num_replicas", "at least 1")
        self.check(self.max_queued_requests >= 0, "max_queued_requests", "at least 0")
        self.check(self.max_queued_tokens is None or self.max_queued_tokens >= 0, "max_queued_tokens", "at least 0")
        self.check(not self.skip_tokenizer_init, "skip_tokenizer_init", "off: the service reads and writes text")

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.served_model_name or default_name(self.model)


@dataclass(frozen=True, kw_only=True)
class BatchConfig(EngineConfig):
    """The engines of a batch job."""

    served_model_name: str | None = option(None, "the model's name in requests; default: that of its file or folder")
    num_engines: int = option(1, "number of engines that share the rows")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.num_engines >= 1, "num_engines", "at least 1")
        self.check(not self.skip_tokenizer_init, "skip_tokenizer_init", "off: a batch job reads and writes text")

    @property
    def name(self) -> str:
        """What requests call the model."""
        return self.served_model_name or default_name(self.model)


def default_name(model: str) -> str:
    """What a model is called in requests, unless the arguments say."""
    return model.rstrip("/").removesuffix(".gguf").rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class ApiConfig(Options):
    """What all models of an application share."""

    api_replicas: int = option(1, "number of processes that serve HTTP, tokenise and detokenise")
    api_keys: tuple[str, ...] = option((), "keys, one of which a request must bear; default: none is asked for")
    max_body_bytes: int = option(16 << 20, "largest body of a request; then 413")
    recovery_timeout_s: float = option(60.0, "longest wait for an engine that comes back before requests end with 503")
    drain_timeout_s: float = option(60.0, "how long running requests may go on after the service was told to stop")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.api_replicas >= 1, "api_replicas", "at least 1")
        self.check(all(isinstance(key, str) and key for key in self.api_keys), "api_keys", "non-empty texts")
        self.check(self.max_body_bytes >= 1, "max_body_bytes", "at least 1")
        self.check(self.recovery_timeout_s >= 0, "recovery_timeout_s", "at least 0")
        self.check(self.drain_timeout_s >= 0, "drain_timeout_s", "at least 0")


def read_arguments(arguments: dict[str, Any]) -> tuple[ApiConfig, list[ServedModel]]:
    """Those of the application and of its models, from a dict as Serve hands it over: values may be texts.

    Several models are a list of dicts, `models`; otherwise the one model's arguments stand beside the others.
    Raises `UsageError`.
    """
    given = dict(arguments)
    listed = given.pop("models", None)
    known = ApiConfig.names() + (["models"] if listed is not None else ServedModel.names())
    check_names(given, known)
    api = ApiConfig.of(**ApiConfig.parse({name: given.pop(name) for name in ApiConfig.names() if name in given}))
    if listed is not None and not (isinstance(listed, list) and listed and all(isinstance(m, dict) for m in listed)):
        raise UsageError("models must be a list with the arguments of each model")
    models = [ServedModel.of(**ServedModel.parse(model)) for model in (listed if listed is not None else [given])]
    names = [model.name for model in models]
    if double := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"served_model_name must differ between models, but two are called {', '.join(double)}")
    return api, models


def engine_config(model: ServedModel | BatchConfig) -> EngineConfig:
    """The engine's part of these arguments."""
    return EngineConfig(**{name: getattr(model, name) for name in EngineConfig.names()})
