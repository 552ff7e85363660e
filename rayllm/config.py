"""The engine's one configuration class. Everything a user can set is a field here, documented where it stands."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from rayllm.errors import UsageError


def _option(default: Any, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Arguments of one engine. Raises `UsageError` for values that can never work.

    Fields that are None are chosen once the model and the device are known, see `resolved`.
    """

    model: str = _option("", "a model folder, a .gguf file, a Hub id, or with load_format=dummy a config.json")
    tokenizer: str | None = _option(None, "tokenizer folder or Hub id; default: the model's own")
    skip_tokenizer_init: bool = _option(False, "token ids in, token ids out; no tokenizer is loaded")
    load_format: Literal["auto", "dummy"] = _option("auto", "dummy: random weights, only a config is read")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "of weights and KV cache; auto: the model's own on a GPU (float32 becomes bfloat16), float32 on a CPU"
    )
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "auto: cuda if the Ray cluster has GPUs")
    tensor_parallel_size: int = _option(1, "number of shards (GPUs, or CPU processes) that the model is split over")
    max_model_len: int | None = _option(None, "longest prompt + output, in tokens; default: the model's own limit")
    max_num_seqs: int = _option(256, "most sequences that run at once")
    max_num_batched_tokens: int | None = _option(
        None, "token budget of a step; default: 8192 on a GPU, 1024 on a CPU, at least max_num_seqs"
    )
    block_size: int = _option(128, "tokens of a KV cache block; a multiple of 16 on a GPU")
    gpu_memory_utilization: float = _option(0.9, "share of each GPU's memory that the engine may fill")
    kv_cache_memory_bytes: int | None = _option(
        None, "size of the KV cache per shard, in bytes; default: what is free on a GPU, 2 GiB in all on a CPU"
    )
    num_gpu_blocks_override: int | None = _option(None, "number of KV cache blocks, on a CPU too; for experiments")
    enable_prefix_caching: bool = _option(True, "keep the KV of finished prompts for those that begin alike")
    enforce_eager: bool = _option(False, "no CUDA graphs")
    seed: int = _option(0, "of the seeds drawn for requests that bring none")
    placement_timeout_s: float = _option(600.0, "longest wait for the cluster to provide the resources, in seconds")

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise UsageError(f"{name} must be {allowed}, not {getattr(self, name)!r}")

        for name, hint in _hints().items():
            if choices := _choices(hint):
                check(getattr(self, name) in choices, name, "one of " + ", ".join(choices))
            else:
                kinds = typing.get_args(hint) or (hint,)
                kind = type(getattr(self, name))
                fits = kind in kinds or (kind is int and float in kinds)
                check(fits, name, " or ".join(k.__name__.removesuffix("Type") for k in kinds))
        check(bool(self.model), "model", "a model folder, a .gguf file or a Hub id")
        for name in ("tensor_parallel_size", "max_num_seqs", "block_size"):
            check(getattr(self, name) >= 1, name, "at least 1")
        for name in ("max_num_batched_tokens", "kv_cache_memory_bytes", "num_gpu_blocks_override"):
            check(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1")
        check(self.max_model_len is None or self.max_model_len >= 2, "max_model_len", "at least 2")
        check(0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", "over 0 and at most 1")
        check(self.placement_timeout_s >= 0, "placement_timeout_s", "at least 0")
        check(
            self.max_num_batched_tokens is None or self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            f"at least max_num_seqs ({self.max_num_seqs}), one token each",
        )
        check(not (self.skip_tokenizer_init and self.tokenizer), "skip_tokenizer_init", "off when a tokenizer is named")

    @classmethod
    def of(cls, **arguments: Any) -> EngineConfig:
        """The configuration of these arguments; an unknown name is a `UsageError` that suggests the nearest one."""
        known = {option.name for option in dataclasses.fields(cls)}
        for name in arguments.keys() - known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise UsageError(f"unknown engine argument {name}: {hint}")
        return cls(**arguments)

    def resolved(self, *, device: str, model_dtype: str, model_max_len: int) -> EngineConfig:
        """This configuration with everything decided that the device and the model decide."""
        if device == "cuda" and self.block_size % 16:
            raise UsageError(f"block_size must be a multiple of 16 on a GPU, not {self.block_size}")
        if (self.max_model_len or 0) > model_max_len:
            raise UsageError(f"max_model_len must be at most {model_max_len} for this model, not {self.max_model_len}")
        dtype = self.dtype
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16" if model_dtype == "float32" else model_dtype  # type: ignore[assignment]
        return dataclasses.replace(
            self,
            device=device,  # type: ignore[arg-type]
            dtype=dtype,
            max_model_len=self.max_model_len or model_max_len,
            max_num_batched_tokens=self.max_num_batched_tokens
            or max(self.max_num_seqs, 8192 if device == "cuda" else 1024),
        )


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """One flag for each field of `EngineConfig` but `model`, of the same name with hyphens."""
    for option in dataclasses.fields(EngineConfig):
        if option.name == "model":
            continue
        hint = _hints()[option.name]
        settings: dict[str, Any] = {"default": option.default, "help": _doc(option.name)}
        if hint is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["choices"] = _choices(hint)
            settings["type"] = next(t for t in (typing.get_args(hint) or (hint,)) if t is not type(None))
            if settings["choices"]:
                settings["type"] = str
            settings["metavar"] = None if settings["choices"] else settings["type"].__name__.upper()
        group.add_argument("--" + option.name.replace("_", "-"), **settings)


def from_arguments(arguments: argparse.Namespace) -> EngineConfig:
    """The configuration that `add_arguments`' flags describe."""
    return EngineConfig(**{option.name: getattr(arguments, option.name) for option in dataclasses.fields(EngineConfig)})


def _hints() -> dict[str, Any]:
    return typing.get_type_hints(EngineConfig)


def _doc(name: str) -> str:
    return EngineConfig.__dataclass_fields__[name].metadata["doc"].replace("%", "%%")


def _choices(hint: Any) -> list[str] | None:
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    assert typing.get_origin(hint) in (None, types.UnionType)
    return None
