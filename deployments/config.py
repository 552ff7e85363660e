"""The arguments of the service: those of each model it serves, and those of the application."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayllm.config import EngineArgs
from rayllm.errors import UsageError, check_names
from rayllm.options import Options, option

KEY_VARIABLE = "VLLM_API_KEY"
"""The environment's variable with a key: where services move from vLLM, it is set already."""

ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s]+")


@dataclass(frozen=True, kw_only=True)
class NamedModel(EngineArgs):
    """An engine whose model requests call by a name, and that reads and writes text."""

    served_model_name: str | tuple[str, ...] | None = option(
        None,
        "The model's name in requests; of several, each is good, and the first stands in metrics. Without it, the name "
        "of its file or folder is used.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        is_named = all(isinstance(name, str) and name for name in self.served_names)
        self.check(is_named, "served_model_name", "non-empty texts")
        self.check(not self.skip_tokenizer_init, "skip_tokenizer_init", "off: requests are read and answered as text")

    @property
    def served_names(self) -> tuple[str, ...]:
        """What requests may call the model."""
        given = self.served_model_name or self.model.rstrip("/").removesuffix(".gguf").rpartition("/")[2]
        return (given,) if isinstance(given, str) else given

    @property
    def name(self) -> str:
        """The first of `served_names`."""
        return self.served_names[0]


@dataclass(frozen=True, kw_only=True)
class ServedModel(NamedModel):
    """One model of the service: its engines' arguments, and how it is served."""

    num_replicas: int = option(1, "Number of engines that serve the model; with max_replicas, the least.")
    max_replicas: int | None = option(
        None, "Most engines that serve the model, by the load. Without it, there are always num_replicas."
    )
    target_ongoing_requests: int | None = option(
        None,
        "Number of choices that each engine has when there are enough engines. Without it, it is three quarters of "
        "max_num_seqs.",
    )
    prefix_routing: bool = option(
        True,
        "Send a choice to the one of several engines where its prompt's beginning was, or its session belongs, unless "
        "that one is busier.",
    )
    max_queued_requests: int = option(
        1024, "Number of choices that may wait beyond the max_num_seqs that run; more get status 429."
    )
    max_queued_tokens: int | None = option(
        None,
        "Number of prompt tokens that may wait beyond what the KV cache holds; more get status 429. Without it, it is "
        "four times the cache.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.num_replicas >= 1, "num_replicas", "at least 1")
        _check_scaling(self, "num_replicas", "max_replicas", "target_ongoing_requests")
        self.check(self.max_queued_requests >= 0, "max_queued_requests", "at least 0")
        self.check(self.max_queued_tokens is None or self.max_queued_tokens >= 0, "max_queued_tokens", "at least 0")


@dataclass(frozen=True, kw_only=True)
class BatchConfig(NamedModel):
    """The engines of a batch job."""

    num_engines: int = option(1, "Number of engines that share the rows.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.num_engines >= 1, "num_engines", "at least 1")


@dataclass(frozen=True, kw_only=True)
class ApiConfig(Options):
    """What all models of an application share."""

    api_replicas: int = option(
        1, "Number of processes that serve HTTP, tokenise and detokenise; with max_api_replicas, the least."
    )
    max_api_replicas: int | None = option(
        None, "Most processes that serve HTTP, by the load. Without it, there are always api_replicas."
    )
    api_target_ongoing_requests: int | None = option(
        None,
        "Number of requests that each HTTP process has when there are enough of them. Without it, it is 128.",
    )
    upscale_delay_s: float = option(
        30.0, "How long, in seconds, there must be too few engines, or HTTP processes, before more start."
    )
    downscale_delay_s: float = option(
        600.0, "How long, in seconds, there must be too many engines, or HTTP processes, before some end."
    )
    api_keys: tuple[str, ...] = option(
        (),
        "Keys, one of which a request must bear. They show in the list of processes, unlike those of api_keys_file and "
        f"of the environment variable {KEY_VARIABLE}. Without any, requests need no key.",
    )
    api_keys_file: str | None = option(
        None, "A file with more keys, one in each line. Without it, there are only the others."
    )
    allowed_origins: tuple[str, ...] = option(
        (), "Origins (https://example.com, or * for all) whose pages may ask, by CORS. Without them, none may."
    )
    log_requests: bool = option(
        False, "Tell of each request, when it ends: id, model, path, tokens, finish, seconds, status; no text of it."
    )
    max_body_bytes: int = option(16 << 20, "Largest body of a request, in bytes; a larger one gets status 413.")
    recovery_timeout_s: float = option(
        60.0, "Longest wait, in seconds, for an engine to come back before requests end with status 503."
    )
    drain_timeout_s: float = option(
        60.0, "How long, in seconds, running requests may go on after the service was told to stop."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.api_replicas >= 1, "api_replicas", "at least 1")
        _check_scaling(self, "api_replicas", "max_api_replicas", "api_target_ongoing_requests")
        self.check(self.upscale_delay_s > 0, "upscale_delay_s", "over 0")
        self.check(self.downscale_delay_s >= 0, "downscale_delay_s", "at least 0")
        self.check(all(isinstance(key, str) and key for key in self.api_keys), "api_keys", "non-empty texts")
        are_origins = all(isinstance(origin, str) and ORIGIN.fullmatch(origin) for origin in self.allowed_origins)
        self.check(are_origins, "allowed_origins", "* or origins such as https://example.com, without a path")
        self.check(self.max_body_bytes >= 1, "max_body_bytes", "at least 1")
        self.check(self.recovery_timeout_s >= 0, "recovery_timeout_s", "at least 0")
        self.check(self.drain_timeout_s >= 0, "drain_timeout_s", "at least 0")

    def with_keys_read(self) -> ApiConfig:
        """This with all keys in `api_keys`, for other nodes. Raises `UsageError` for a file that has none."""
        keys = [*self.api_keys, *filter(None, [os.environ.get(KEY_VARIABLE)])]
        if (file := self.api_keys_file) is not None:
            try:
                found = [line.strip() for line in Path(file).expanduser().read_text("utf-8-sig").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
                raise UsageError(f"api_keys_file {file!r} cannot be read: {reason}", "api_keys_file") from None
            self.check(any(found), "api_keys_file", "a file with a key in each line")
            keys += filter(None, found)
        return dataclasses.replace(self, api_keys=tuple(dict.fromkeys(keys)), api_keys_file=None)


def _check_scaling(options: Options, least: str, most: str, target: str) -> None:
    fewest, maximum, wanted = (getattr(options, name) for name in (least, most, target))
    options.check(maximum is None or maximum >= fewest, most, f"at least {least} ({fewest})")
    options.check(wanted is None or wanted >= 1, target, "at least 1")
    options.check(wanted is None or maximum is not None, target, f"left out without {most}")


def scaling(least: int, most: int | None, target: int, api: ApiConfig) -> dict[str, Any]:
    """Serve's options for a deployment of `least` to `most` replicas that have `target` requests each.

    Serve looks at the mean over the time that an excess must last.
    """
    if most is None:
        return {"num_replicas": least}
    limits = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target}
    delays = {"upscale_delay_s": api.upscale_delay_s, "downscale_delay_s": api.downscale_delay_s}
    window = {"look_back_period_s": api.upscale_delay_s, "metrics_interval_s": api.upscale_delay_s / 3}
    return {"autoscaling_config": limits | delays | window}


def read_arguments(arguments: dict[str, Any]) -> tuple[ApiConfig, list[ServedModel]]:
    """The arguments of the application and of its models, from a dict as Serve hands it over: values may be texts.

    Several models are a list of dicts, `models`; otherwise the one model's arguments stand beside the others.
    Raises `UsageError`.
    """
    given = dict(arguments)
    listed = given.pop("models", None)
    known = ApiConfig.names() + (["models"] if listed is not None else ServedModel.names())
    check_names(given, known, "engine argument")
    api = ApiConfig.of(**ApiConfig.parse({name: given.pop(name) for name in ApiConfig.names() if name in given}))
    if listed is not None and not (isinstance(listed, list) and listed and all(isinstance(m, dict) for m in listed)):
        raise UsageError("models must be a list with the arguments of each model", "models")
    models = [ServedModel.of(**ServedModel.parse(model)) for model in (listed if listed is not None else [given])]
    names = [name for model in models for name in model.served_names]
    if double := {name for name in names if names.count(name) > 1}:
        raise UsageError(
            f"served_model_name must differ between models, but two are called {', '.join(double)}", "served_model_name"
        )
    return api, models
