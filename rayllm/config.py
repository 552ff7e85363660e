"""The engine's two configurations: what a user gives, and what the engine runs with.

Everything a user can set is a field of `EngineArgs`, documented where it stands; flags and checks come from it.
`EngineArgs.resolve` decides the rest once model and device are known: `EngineConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from rayllm.errors import UsageError
from rayllm.model_config import ModelConfig
from rayllm.options import Options, option

DeviceName = Literal["cpu", "cuda"]

SINKS = 4
"""First tokens of a prompt, which pruning always keeps (attention sinks, arXiv:2309.17453)."""


def blocks_for(num_tokens: int, block_size: int) -> int:
    """How many KV cache blocks have room for so many tokens."""
    return -(-num_tokens // block_size)


@dataclass(frozen=True, kw_only=True)
class EngineArgs(Options):
    """Arguments of one engine, as its user gives them. Raises `UsageError` for values that can never work.

    What is None or "auto" is decided by `resolve`.
    """

    model: str = option(
        "", "The model: a folder, a .gguf file, a Hub id, a URL (s3://…), or with load_format=dummy a config.json."
    )
    tokenizer: str | None = option(
        None, "Folder, .gguf file, Hub id or URL of the tokenizer. Without it, the model's own is used."
    )
    chat_template: str | None = option(
        None, "The chat template: a Jinja file, or the template itself. Without it, the tokenizer's own is used."
    )
    skip_tokenizer_init: bool = option(False, "Load no tokenizer: token ids go in, and token ids come out.")
    generation_config: Literal["auto", "vllm"] = option(
        "auto",
        "Where requests get the sampling parameters that they leave open. With auto it is the model's "
        "generation_config.json, with vllm all of them do nothing.",
    )
    load_format: Literal["auto", "dummy"] = option("auto", "With dummy, weights are random and only a config is read.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Type of the weights and the KV cache. With auto it is the model's own on a GPU (bfloat16 for float32), and "
        "float32 on a CPU.",
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "What the engine runs on. With auto it is cuda if the Ray cluster has GPUs."
    )
    tensor_parallel_size: int = option(1, "Number of shards (GPUs, or CPU processes) that the model is split over.")
    max_model_len: int | None = option(
        None, "Longest prompt and output together, in tokens. Without it, the model's own limit holds."
    )
    max_num_seqs: int = option(256, "Most sequences that run at once.")
    max_num_batched_tokens: int | None = option(
        None, "Token budget of a step. Without it, it is 8192 on a GPU and 1024 on a CPU, and at least max_num_seqs."
    )
    block_size: int = option(128, "Number of tokens in a KV cache block; it must be a multiple of 16 on a GPU.")
    gpu_memory_utilization: float = option(0.9, "Share of each GPU's memory that the engine may fill.")
    kv_cache_memory_bytes: int | None = option(
        None,
        "Size of the KV cache of each shard, in bytes. Without it, it is what is free on a GPU, 2 GiB in all on a CPU.",
    )
    num_gpu_blocks_override: int | None = option(
        None, "Number of KV cache blocks, on a CPU too, for experiments. Without it, they fill the memory allowed."
    )
    enable_prefix_caching: bool = option(True, "Keep the KV of finished prompts for those that begin alike.")
    enable_snapkv: bool = option(False, "Keep only a part of long prompts' KV once they are computed.")
    snapkv_limit: int = option(2048, "Number of tokens of a prompt that each layer and KV head keeps.")
    snapkv_attn_sample_queries: int = option(32, "Number of last prompt tokens whose attention decides what is kept.")
    snapkv_policy: Literal["snapkv", "streaming"] = option(
        "snapkv", "With streaming, the first and the most recent tokens are kept, whatever attends to them."
    )
    enforce_eager: bool = option(False, "Run without CUDA graphs.")
    seed: int = option(0, "The engine's seed, from which requests without a seed get theirs.")
    step_timeout_s: float | None = option(
        None,
        "A step that takes longer, in seconds, means a stuck engine, which is replaced. Without it, it is 10 on a GPU "
        "and 300 on a CPU.",
    )
    placement_timeout_s: float = option(600.0, "Longest wait for the cluster to provide the resources, in seconds.")

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
        least = self._min_snapkv_limit
        check(self.snapkv_limit >= least, "snapkv_limit", f"at least {least}, the tokens that are always kept")
        check(0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", "over 0 and at most 1")
        check(self.placement_timeout_s >= 0, "placement_timeout_s", "at least 0")
        check(self.step_timeout_s is None or self.step_timeout_s > 0, "step_timeout_s", "over 0")
        check(
            self.max_num_batched_tokens is None or self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            f"at least max_num_seqs ({self.max_num_seqs}), one token each",
        )
        for name in ("tokenizer", "chat_template"):
            is_off = not (self.skip_tokenizer_init and getattr(self, name))
            check(is_off, "skip_tokenizer_init", f"off when {name} is given")

    def resolve(self, model: ModelConfig, device: DeviceName) -> EngineConfig:
        """What the engine runs with, everything decided. Raises `UsageError` for what cannot work together."""
        model.check_tensor_parallel(self.tensor_parallel_size)
        is_gpu = device == "cuda"
        self.check(not is_gpu or self.block_size % 16 == 0, "block_size", "a multiple of 16 on a GPU")
        longest = model.max_model_len
        self.check((self.max_model_len or 0) <= longest, "max_model_len", f"at most {longest} for this model")
        if self.enable_snapkv and self.tensor_parallel_size > model.num_key_value_heads:
            raise UsageError(
                f"tensor_parallel_size must be at most {model.num_key_value_heads} with enable_snapkv, the model's KV "
                "heads: shards that share one would keep different tokens of it",
                "tensor_parallel_size",
            )
        least_tokens = self.max_num_seqs + (self.snapkv_attn_sample_queries if self.enable_snapkv else 0)
        self.check(
            self.max_num_batched_tokens is None or self.max_num_batched_tokens >= least_tokens,
            "max_num_batched_tokens",
            f"at least max_num_seqs + snapkv_attn_sample_queries ({least_tokens})",
        )
        decided = {
            "device": device,
            "dtype": self._dtype(model.dtype, device),
            "max_model_len": self.max_model_len or longest,
            "max_num_batched_tokens": self.max_num_batched_tokens or max(least_tokens, 8192 if is_gpu else 1024),
            "step_timeout_s": self.step_timeout_s or (10.0 if is_gpu else 300.0),
            "min_snapkv_limit": self._min_snapkv_limit,
            "tokenizer": self._tokenizer_path,
            "sampling_defaults": model.sampling_defaults if self.generation_config == "auto" else (),
        }
        given = {field.name: getattr(self, field.name) for field in fields(EngineConfig) if field.name not in decided}
        return EngineConfig(**given | decided)

    def check_model(self, model: ModelConfig) -> None:
        """Raises `UsageError` for what cannot work with `model` on any device: a CPU refuses least."""
        self.resolve(model, "cpu" if self.device == "auto" else self.device)

    @property
    def _tokenizer_path(self) -> str | None:
        """The tokenizer as other processes of this node find it."""
        if self.tokenizer is None or not Path(self.tokenizer).expanduser().exists():
            return self.tokenizer
        return str(Path(self.tokenizer).expanduser().resolve())

    @property
    def _min_snapkv_limit(self) -> int:
        """Tokens of a prompt that pruning always keeps: the first ones and the window."""
        return SINKS + self.snapkv_attn_sample_queries

    def _dtype(self, model_dtype: str, device: DeviceName) -> str:
        if self.dtype != "auto":
            return self.dtype
        if device == "cpu":
            return "float32"
        return "bfloat16" if model_dtype == "float32" else model_dtype


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine runs with, made by `EngineArgs.resolve`; its fields are explained there."""

    device: DeviceName
    dtype: str
    tokenizer: str | None
    """None: the model's own."""
    skip_tokenizer_init: bool
    tensor_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    """None: what the device has free, see `rayllm.runner.kv_cache`."""
    num_gpu_blocks_override: int | None
    """None: as many as fit."""
    enable_prefix_caching: bool
    enable_snapkv: bool
    snapkv_limit: int
    min_snapkv_limit: int
    """The least `snapkv_limit` that a request may ask for."""
    snapkv_attn_sample_queries: int
    snapkv_policy: str
    enforce_eager: bool
    seed: int
    step_timeout_s: float
    placement_timeout_s: float
    sampling_defaults: tuple[tuple[str, float], ...]
    """Fields of `SamplingParams` that requests leave open, and their values."""
