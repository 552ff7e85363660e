"""What a shard does between loading its weights and making its cache: kernels are compiled, and memory is measured.

Both run steps on an executor of their own, which is gone when they end.
"""

from __future__ import annotations

import gc
from array import array

import torch
from rayllm_kernels import compiling

from rayllm.messages.base import pack_ids
from rayllm.messages.step import LaneStart, StepInput
from rayllm.runner import kv_cache, precompile
from rayllm.runner.executor import Executor
from rayllm.runner.loading import LoadedModel
from rayllm.runner.model_input import pack_padding, unpack
from rayllm.sampling_params import SamplingParams


@torch.inference_mode()
def compile_kernels(model: LoadedModel) -> None:
    """Compiles the kernels of all kinds of steps, many at a time: one by one, as they run, takes far longer."""
    if not model.device.is_cuda:
        return
    executor = Executor(model, [1] * len(model.model_config.kv_groups))
    lanes = executor.lanes
    decodes = [shape for shape in executor.graph_shapes if not shape.num_chunks]
    chunked = [shape for shape in executor.graph_shapes if shape.num_chunks]
    with compiling():
        for shape in (*decodes[:2], decodes[-1], chunked[0], chunked[-1]):
            if shape.num_chunks:
                precompile.wait()
            packed = model.device.put(pack_padding(shape, lanes.padding, len(lanes.block_tables)))
            output = executor.forward(unpack(packed, shape, lanes))
        executor.sampler.launch_filter(output.logits)
        if executor.pruner is not None:
            executor.pruner.prune_nothing(model.config.max_model_len)


def count_blocks(model: LoadedModel) -> list[int]:
    """KV cache blocks of each group that fit beside the weights and the largest step. Raises `UsageError` when one
    sequence of `max_model_len` tokens does not fit."""
    activation_bytes = _measure_largest_step(model) if model.device.is_cuda else 0
    return kv_cache.count_blocks(model.config, model.model_config, model.device, activation_bytes)


@torch.inference_mode()
def _measure_largest_step(model: LoadedModel) -> int:
    """Bytes that an executor needs beside weights and cache in the largest step, with all that sampling can ask for."""
    config, num_groups = model.config, len(model.model_config.kv_groups)
    length = min(config.max_num_batched_tokens // config.max_num_seqs, config.max_model_len - 1)
    num_blocks = -(-length // config.block_size)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    executor = Executor(model, [num_blocks] * num_groups)
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
        rows=array("i", [n for lane in lanes for n in (lane, 0, length, 1, *(0, length) * num_groups)]).tobytes(),
        num_decodes=0,
    )
    cache_bytes = sum(cache.nbytes for group in executor.groups for cache in (group.keys, group.values))
    executor.execute(step).wait()
    activation_bytes = torch.cuda.max_memory_allocated() - before - cache_bytes
    if executor.pruner is not None:  # beside what graphs hold
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        executor.pruner.prune_nothing(config.max_model_len)
        activation_bytes += torch.cuda.max_memory_allocated() - before
    del executor
    gc.collect()
    torch.cuda.empty_cache()
    return activation_bytes
