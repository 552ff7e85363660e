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

from rayllm.runner.model_input import GroupInput, ModelInput, Shape


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
        shape, n = inputs.shape, inputs.shape.num_decodes
        tables, kv_lens = own.block_tables, own.kv_lens
        window_tokens = None
        if shape.num_prunes:
            steps = torch.arange(-self.windows.shape[2], 0, device=self.windows.device)
            window_tokens = (inputs.window_ends[:, None] + steps).clamp_(min=0).flatten()
        return FullAttentionStep(
            group=self,
            shape=shape,
            slot_mapping=own.slot_mapping,
            decodes=(tables[:n], kv_lens[:n], shape.max_kv_len),
            chunks=(tables[n:], kv_lens[n:], shape.max_kv_len),
            cu_seqlens_q=inputs.cu_seqlens_q,
            items=divide_decodes(kv_lens[:n], self.keys[0]),
            window_tokens=window_tokens,
        )


@dataclass(frozen=True)
class FullAttentionStep:
    """One step of a `FullAttention`."""

    group: FullAttention
    shape: Shape
    slot_mapping: torch.Tensor
    """[T] int64"""
    decodes: tuple[torch.Tensor, torch.Tensor, int]
    """Block tables, lengths and the longest one of the decode rows, as `PagedKV` takes them."""
    chunks: tuple[torch.Tensor, torch.Tensor, int]
    """The same of the chunks."""
    cu_seqlens_q: torch.Tensor
    """[P + 1] int32"""
    items: DecodeItems | None
    window_tokens: torch.Tensor | None
    """[prompts · window] int64: the tokens of the windows, in the step's flat tokens."""

    def attend(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Stores and attends in the group's layer of that index; tensors are those of `models.decoder.Attend`."""
        shape, group, n = self.shape, self.group, self.shape.num_decodes
        keys, values = group.keys[index], group.values[index]
        # stored before attending: a block can be hit in this very step
        q = rope_and_store(q, k, v, rope, keys, values, self.slot_mapping)
        if self.window_tokens is not None:
            windows = group.windows[index, : shape.num_prunes]
            torch.index_select(q, 0, self.window_tokens, out=windows.flatten(0, 1))
        out = None
        if shape.num_chunks:
            chunks = PagedKV(keys, values, *self.chunks)
            out = prefill_attention(q, chunks, self.cu_seqlens_q, shape.max_seqlen_q, group.scale)
        if not n:
            assert out is not None, "a step has rows"
            return out
        # padding rows, which have no keys, stand where chunks have their first tokens: left as they are
        decodes = PagedKV(keys, values, *self.decodes)
        decoded = decode_attention(q[:n], decodes, group.scale, self.items, None if out is None else out[:n])
        return decoded if out is None else out


class AttentionByLayer:
    """The `Attend` of one step: each layer's call goes to its KV group."""

    def __init__(self, attentions: Sequence[FullAttention], inputs: ModelInput):
        self._steps: dict[int, tuple[FullAttentionStep, int]] = {}
        for attention, own in zip(attentions, inputs.groups, strict=True):
            step = attention.begin(inputs, own)
            self._steps |= {layer: (step, index) for index, layer in enumerate(attention.layers)}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope) -> torch.Tensor:
        step, index = self._steps[layer]
        return step.attend(index, q, k, v, rope)
