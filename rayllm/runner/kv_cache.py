"""The size of a shard's KV cache, and its allocation: a pool of blocks for each KV group."""

from __future__ import annotations

import os

import torch

from rayllm.config import EngineConfig, blocks_for
from rayllm.errors import UsageError
from rayllm.model_config import KVGroup, ModelConfig
from rayllm.runner.device import DTYPES, Device

GIB = 1 << 30


def count_blocks(config: EngineConfig, model: ModelConfig, device: Device, activation_bytes: int) -> list[int]:
    """How many blocks of each KV group one shard has room for, its weights being loaded.

    `activation_bytes` is what the largest step needs beside them. All groups get the same number, as long as each keeps
    every token. Raises `UsageError` with both numbers when one sequence of `max_model_len` tokens does not fit.
    """
    token_bytes = model.kv_bytes_per_token(DTYPES[config.dtype].itemsize, config.tensor_parallel_size)
    needed = blocks_for(config.max_model_len, config.block_size)
    if config.num_gpu_blocks_override is not None:
        room = config.num_gpu_blocks_override
    else:
        room = _budget(config, device, activation_bytes) // (token_bytes * config.block_size) - 1  # one takes padding
    if room < needed:
        gib = token_bytes * config.block_size / GIB
        raise UsageError(
            f"not enough memory for one sequence: max_model_len={config.max_model_len} needs {needed} KV cache blocks "
            f"({needed * gib:.3f} GiB per shard), there is room for {max(room, 0)} ({max(room, 0) * gib:.3f} GiB): "
            "lower max_model_len or provide more memory",
            "max_model_len",
        )
    return [room] * len(model.kv_groups)


def _budget(config: EngineConfig, device: Device, activation_bytes: int) -> int:
    """Bytes that the cache may take on one shard."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if not device.is_cuda:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(2 * GIB, available // 2) // config.tensor_parallel_size
    free, total = device.memory()
    return int(total * config.gpu_memory_utilization) - (total - free) - activation_bytes


def allocate(
    config: EngineConfig, model: ModelConfig, group: KVGroup, device: Device, num_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one KV group, each [layers, num_blocks + 1, block_size, local KV heads, head_dim].

    The last block takes what padding rows write. Zeros, since masked slots are still multiplied by 0.
    """
    heads = model.local_kv_heads(config.tensor_parallel_size)
    shape = (2, len(group.layers), num_blocks + 1, config.block_size, heads, model.head_dim)
    keys, values = device.zeros(shape, DTYPES[config.dtype])
    return keys, values
