"""The engine's one configuration class. Everything a user can set is a field here, documented where it stands."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

from rayllm.errors import UsageError

SINKS = 4
"""First tokens of a prompt, which pruning always keeps (attention sinks, arXiv:2309.17453)."""


def option(default: Any, doc: str) -> Any:
    """A field of `Options`."""
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of configurations: checks the types of its fields, and makes flags of them. Raises `UsageError`."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            if choices := _choices(hint):
                self.check(getattr(self, name) in choices, name, "one of " + ", ".join(choices))
            else:
                kinds = [typing.get_origin(kind) or kind for kind in _kinds(hint)]
                kind = type(getattr(self, name))
                fits = kind in kinds or (kind is int and float in kinds)
                self.check(fits, name, " or ".join(map(_kind_name, kinds)))

    def check(self, ok: bool, name: str, allowed: str) -> None:
        if not ok:
            raise UsageError(f"{name} must be {allowed}, not {getattr(self, name)!r}", name)

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def of(cls, **arguments: Any) -> Self:
        """The configuration of these arguments; an unknown name is a `UsageError` that suggests the nearest one."""
        check_names(arguments, cls.names())
        return cls(**arguments)

    @classmethod
    def parse(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """`arguments` with texts turned into what their fields hold: "8" into 8, "true" into True, JSON into lists."""
        hints = _hints(cls)
        return {name: _parse(value, hints[name]) if name in hints else value for name, value in arguments.items()}


def check_names(arguments: Iterable[str], known: list[str]) -> None:
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise UsageError(f"unknown engine argument {name}: {hint}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Options):
    """Arguments of one engine. Raises `UsageError` for values that can never work.

    Fields that are None are chosen once the model and the device are known, see `resolved`.
    """

    model: str = option("", "a folder, a .gguf file, a Hub id, a URL (s3://…), or with load_format=dummy a config.json")
    tokenizer: str | None = option(None, "tokenizer folder or Hub id; default: the model's own")
    skip_tokenizer_init: bool = option(False, "token ids in, token ids out; no tokenizer is loaded")
    load_format: Literal["auto", "dummy"] = option("auto", "dummy: random weights, only a config is read")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of weights and KV cache; auto: the model's own on a GPU (float32 becomes bfloat16), float32 on a CPU"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if the Ray cluster has GPUs")
    tensor_parallel_size: int = option(1, "number of shards (GPUs, or CPU processes) that the model is split over")
    max_model_len: int | None = option(None, "longest prompt + output, in tokens; default: the model's own limit")
    max_num_seqs: int = option(256, "most sequences that run at once")
    max_num_batched_tokens: int | None = option(
        None, "token budget of a step; default: 8192 on a GPU, 1024 on a CPU, at least max_num_seqs"
    )
    block_size: int = option(128, "tokens of a KV cache block; a multiple of 16 on a GPU")
    gpu_memory_utilization: float = option(0.9, "share of each GPU's memory that the engine may fill")
    kv_cache_memory_bytes: int | None = option(
        None, "size of the KV cache per shard, in bytes; default: what is free on a GPU, 2 GiB in all on a CPU"
    )
    num_gpu_blocks_override: int | None = option(None, "number of KV cache blocks, on a CPU too; for experiments")
    enable_prefix_caching: bool = option(True, "keep the KV of finished prompts for those that begin alike")
    enable_snapkv: bool = option(False, "keep only a part of long prompts' KV once they are computed")
    snapkv_limit: int = option(2048, "how many tokens of a prompt each layer and KV head keeps")
    snapkv_attn_sample_queries: int = option(32, "last prompt tokens whose attention decides what is kept")
    snapkv_policy: Literal["snapkv", "streaming"] = option(
        "snapkv", "streaming: the first and the most recent tokens are kept, whatever attends to them"
    )
    enforce_eager: bool = option(False, "no CUDA graphs")
    seed: int = option(0, "of the seeds drawn for requests that bring none")
    step_timeout_s: float | None = option(
        None, "a step that takes longer, in seconds, means a stuck engine, which is replaced; default: GPU 10, CPU 300"
    )
    placement_timeout_s: float = option(600.0, "longest wait for the cluster to provide the resources, in seconds")

    def __post_init__(self) -> None:
        super().__post_init__()
        check = self.check
        check(bool(self.model), "model", "a model folder, a .gguf file or a Hub id")
        for name in ("tensor_parallel_size", "max_num_seqs", "block_size"):
            check(getattr(self, name) >= 1, name, "at least 1")
        for name in ("max_num_batched_tokens", "kv_cache_memory_bytes", "num_gpu_blocks_override"):
            check(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1")
        check(self.max_model_len is None or self.max_model_len >= 2, "max_model_len", "at least 2")
        check(self.snapkv_attn_sample_queries >= 2, "snapkv_attn_sample_queries", "at least 2")
        least = self.min_snapkv_limit
        check(self.snapkv_limit >= least, "snapkv_limit", f"at least {least}, the tokens that are always kept")
        check(0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", "over 0 and at most 1")
        check(self.placement_timeout_s >= 0, "placement_timeout_s", "at least 0")
        check(self.step_timeout_s is None or self.step_timeout_s > 0, "step_timeout_s", "over 0")
        check(
            self.max_num_batched_tokens is None or self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            f"at least max_num_seqs ({self.max_num_seqs}), one token each",
        )
        check(not (self.skip_tokenizer_init and self.tokenizer), "skip_tokenizer_init", "off when a tokenizer is named")

    @property
    def min_snapkv_limit(self) -> int:
        """Tokens of a prompt that pruning always keeps: the first ones and the window."""
        return SINKS + self.snapkv_attn_sample_queries

    def resolved(self, *, device: str, model_dtype: str, model_max_len: int, model_kv_heads: int = 0) -> Self:
        """This configuration with everything decided that the device and the model decide."""
        if device == "cuda" and self.block_size % 16:
            raise UsageError(f"block_size must be a multiple of 16 on a GPU, not {self.block_size}")
        if (self.max_model_len or 0) > model_max_len:
            raise UsageError(f"max_model_len must be at most {model_max_len} for this model, not {self.max_model_len}")
        dtype = self.dtype
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16" if model_dtype == "float32" else model_dtype  # type: ignore[assignment]
        if self.enable_snapkv and 0 < model_kv_heads < self.tensor_parallel_size:
            raise UsageError(
                f"tensor_parallel_size must be at most {model_kv_heads} with enable_snapkv, the model's KV heads: "
                f"shards that share one would keep different tokens of it"
            )
        window = self.snapkv_attn_sample_queries if self.enable_snapkv else 0
        if self.max_num_batched_tokens and self.max_num_batched_tokens < self.max_num_seqs + window:
            raise UsageError(
                f"max_num_batched_tokens must be at least max_num_seqs + snapkv_attn_sample_queries "
                f"({self.max_num_seqs + window}), not {self.max_num_batched_tokens}"
            )
        return dataclasses.replace(
            self,
            device=device,  # type: ignore[arg-type]
            dtype=dtype,
            max_model_len=self.max_model_len or model_max_len,
            step_timeout_s=self.step_timeout_s or (10.0 if device == "cuda" else 300.0),
            max_num_batched_tokens=self.max_num_batched_tokens
            or max(self.max_num_seqs + window, 8192 if device == "cuda" else 1024),
        )


def add_arguments(group: argparse._ArgumentGroup, cls: type[Options] = EngineConfig) -> None:
    """One flag for each field of `cls` but `model`, of the same name with hyphens."""
    for field in dataclasses.fields(cls):
        if field.name == "model":
            continue
        hint = _hints(cls)[field.name]
        settings: dict[str, Any] = {"default": field.default, "help": field.metadata["doc"].replace("%", "%%")}
        if hint is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple:
            settings |= {"nargs": "+", "metavar": "TEXT"}
        elif choices := _choices(hint):
            settings |= {"choices": choices, "type": str}
        else:
            settings["type"] = _kinds(hint)[0]
            settings["metavar"] = settings["type"].__name__.upper()
        group.add_argument("--" + field.name.replace("_", "-"), **settings)


T = TypeVar("T", bound=Options)


def from_arguments(arguments: argparse.Namespace, cls: type[T] = EngineConfig) -> T:  # type: ignore[assignment]
    """The configuration that `add_arguments`' flags describe."""
    values = {name: getattr(arguments, name) for name in cls.names()}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _hints(cls: type[Options]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union, None last, or the one type."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _kind_name(kind: type) -> str:
    return "list" if kind is tuple else kind.__name__.removesuffix("Type")


def _choices(hint: Any) -> list[str] | None:
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else None


def _parse(value: Any, hint: Any) -> Any:
    """A value that does not parse stays as it is, to be refused by name."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str) or str in _kinds(hint) or _choices(hint):
        return value
    with contextlib.suppress(ValueError):
        parsed = json.loads(value.lower() if hint is bool else value)
        return tuple(parsed) if isinstance(parsed, list) else parsed
    return value
