"""Attention over the KV cache: a class for each kind of KV group, which owns the group's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rayllm_kernels import (
    DecodeItems,
    PagedKV,
    Rope,
    decode_attention,
    divide_decodes,
    prefill_attention,
    rope_and_store,
)

from rayllm.runner.model_input import GroupInput, ModelInput


@dataclass(frozen=True)
class FullAttention:
    """The layers of a KV group that attend to every token; owns their keys and values."""

    layers: tuple[int, ...]
    keys: torch.Tensor
    """[layers, num_blocks + 1, block_size, Hkv, D]; the last block takes what padding rows write."""
    values: torch.Tensor
    """Like `keys`."""
    windows: torch.Tensor
    """[layers, prompts, window, Hq, D]: the queries of the windows of the prompts that a step prunes; empty where
    nothing is pruned."""
    scale: float

    def begin(self, inputs: ModelInput, own: GroupInput) -> FullAttentionStep:
        """The attention of one step, of which `own` is this group's part: what its layers share is computed here."""
        n = inputs.shape.num_decodes
        window_tokens = None
        if inputs.shape.num_prunes:
            steps = torch.arange(-self.windows.shape[2], 0, device=self.windows.device)
            window_tokens = (inputs.window_ends[:, None] + steps).clamp_(min=0).flatten()
        return FullAttentionStep(self, inputs, own, divide_decodes(own.kv_lens[:n], self.keys[0]), window_tokens)


@dataclass(frozen=True)
class FullAttentionStep:
    """One step of a `FullAttention`."""

    group: FullAttention
    inputs: ModelInput
    own: GroupInput
    items: DecodeItems | None
    window_tokens: torch.Tensor | None
    """[prompts · window] int64: the tokens of the windows, in the step's flat tokens."""

    def attend(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Stores and attends in the group's layer of that index; tensors as `rayllm.models.Attend` has them."""
        shape, n, own = self.inputs.shape, self.inputs.shape.num_decodes, self.own
        keys, values = self.group.keys[index], self.group.values[index]
        # stored before attending: a block can be hit in this very step
        q = rope_and_store(q, k, v, rope, keys, values, own.slot_mapping)
        if self.window_tokens is not None:
            windows = self.group.windows[index, : shape.num_prunes]
            torch.index_select(q, 0, self.window_tokens, out=windows.flatten(0, 1))
        out = None
        if shape.num_chunks:
            chunks = PagedKV(keys, values, own.block_tables[n:], own.kv_lens[n:], shape.max_kv_len)
            out = prefill_attention(q, chunks, self.inputs.cu_seqlens_q, shape.max_seqlen_q, self.group.scale)
        if not n:
            assert out is not None, "a step has rows"
            return out
        # padding rows, which have no keys, stand where chunks have their first tokens: left as they are
        decodes = PagedKV(keys, values, own.block_tables[:n], own.kv_lens[:n], shape.max_kv_len)
        decoded = decode_attention(q[:n], decodes, self.group.scale, self.items, None if out is None else out[:n])
        return decoded if out is None else out


class StepAttention:
    """The `Attend` of one step: each layer's call goes to its KV group."""

    def __init__(self, groups: Sequence[FullAttention], inputs: ModelInput):
        self._steps = {
            layer: (step, index)
            for group, own in zip(groups, inputs.groups, strict=True)
            for step in (group.begin(inputs, own),)
            for index, layer in enumerate(group.layers)
        }

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope) -> torch.Tensor:
        step, index = self._steps[layer]
        return step.attend(index, q, k, v, rope)
