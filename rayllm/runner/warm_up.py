"""What a shard does between loading its weights and making its cache: kernels are compiled, and memory is measured.

Both run steps on an executor of their own, which is gone when they end.
"""

from __future__ import annotations

import gc

import torch
from rayllm_kernels import compiling

from rayllm.config import blocks_for
from rayllm.messages.base import pack_ids
from rayllm.messages.step import LaneStart, StepInput, row
from rayllm.runner import kv_cache, precompile
from rayllm.runner.executor import Executor
from rayllm.runner.loading import LoadedModel
from rayllm.runner.model_input import pack_padding, unpack
from rayllm.sampling_params import SamplingParams


@torch.inference_mode()
def compile_kernels(loaded: LoadedModel) -> None:
    """Compiles the kernels of all kinds of steps, many at a time: one by one, as they run, takes far longer."""
    if not loaded.device.is_cuda:
        return
    executor = Executor(loaded, [1] * len(loaded.model_config.kv_groups))
    lanes = executor.lanes
    decodes = [shape for shape in executor.graph_shapes if not shape.num_chunks]
    chunked = [shape for shape in executor.graph_shapes if shape.num_chunks]
    with compiling():
        for shape in (*decodes[:2], decodes[-1], chunked[0], chunked[-1]):
            if shape.num_chunks:
                precompile.wait()
            packed = loaded.device.put(pack_padding(shape, lanes.padding, len(lanes.block_tables)))
            output = executor.forward(unpack(packed, shape, lanes))
        executor.sampler.launch_filter(output.logits)
        if executor.pruner is not None:
            executor.pruner.prune_nothing(loaded.config.max_model_len)


def count_blocks(loaded: LoadedModel) -> list[int]:
    """KV cache blocks of each group that fit beside the weights and the largest step. Raises `UsageError` when one
    sequence of `max_model_len` tokens does not fit."""
    activation_bytes = _measure_largest_step(loaded) if loaded.device.is_cuda else 0
    return kv_cache.count_blocks(loaded.config, loaded.model_config, loaded.device, activation_bytes)


@torch.inference_mode()
def _measure_largest_step(loaded: LoadedModel) -> int:
    """Bytes that an executor needs beside weights and cache, lanes and windows included, in the largest step and with
    all that sampling can ask for."""
    config, num_groups = loaded.config, len(loaded.model_config.kv_groups)
    length = min(config.max_num_batched_tokens // config.max_num_seqs, config.max_model_len - 1)
    num_blocks = blocks_for(length, config.block_size)
    lanes = range(config.max_num_seqs)
    step = StepInput(
        incarnation=0,
        step_id=0,
        starts=[
            LaneStart(
                lane=lane,
                token_ids=pack_ids([0] * length),
                num_prompt_tokens=length,
                block_tables=[list(range(num_blocks))] * num_groups,
                params=SamplingParams(top_p=0.9, presence_penalty=1, logprobs=20),
                seed=0,
                banned_token_ids=[],
                prompt_logprobs=None,
            )
            for lane in lanes
        ],
        new_blocks=[],
        rows=pack_ids(number for lane in lanes for number in row(lane, 0, length, 1, [(0, length)] * num_groups)),
        num_decodes=0,
    )
    with loaded.device.measuring() as whole:
        executor = Executor(loaded, [num_blocks] * num_groups)
        executor.execute(step).wait()
    cache_bytes = sum(cache.nbytes for attention in executor.attentions for cache in (attention.keys, attention.values))
    activation_bytes = whole() - cache_bytes
    if executor.pruner is not None:  # beside what graphs hold
        with loaded.device.measuring() as pruning:
            executor.pruner.prune_nothing(config.max_model_len)
        activation_bytes += pruning()
    del executor
    gc.collect()
    torch.cuda.empty_cache()
    return activation_bytes
