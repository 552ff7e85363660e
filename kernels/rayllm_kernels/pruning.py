"""Pruning of one prompt's KV, in several layers at once: how much its last queries attend to each key, which keys are
kept, and the move of what is kept into blocks of its own (SnapKV, arXiv:2404.14469)."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import torch.nn.functional as F

from rayllm_kernels._triton import jit, tl, triton

TILE = 64
"""Keys in a program's tile."""
MIN_SPLIT = 2048
"""Keys that one program takes, at least."""


def window_scores_reference(
    q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor, kv_len: int, scale: float
) -> torch.Tensor:
    """See `window_scores`."""
    window, num_kv_heads = q.shape[1], k_cache.shape[3]
    blocks = block_table[: -(-kv_len // k_cache.shape[2])]
    causal = torch.ones(window, kv_len, dtype=torch.bool, device=q.device).tril_(kv_len - window)
    scores = []
    for queries, layer_cache in zip(q, k_cache, strict=True):
        keys = layer_cache.index_select(0, blocks).flatten(0, 1)[:kv_len]
        grouped = queries.unflatten(1, (num_kv_heads, -1))
        logits = torch.einsum("whgd,khd->hgwk", grouped.float(), keys.float()) * scale
        weights = logits.masked_fill_(~causal, -torch.inf).softmax(dim=-1)
        scores.append(weights.sum(dim=2).amax(dim=1))
    return torch.stack(scores)


@jit
def _rows_and_tile(
    q,
    k_cache,
    block_table,
    head,
    kv_head,
    kv_len,
    tile,
    end,
    log2_scale,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scaled logits, base 2, of one head's window queries on one tile of keys: [WINDOW_PADDED, TILE]."""
    row = tl.arange(0, WINDOW_PADDED)
    dim = tl.arange(0, HEAD_DIM_PADDED)[None, :]
    q_offsets = (row[:, None] * HEADS + head) * HEAD_DIM + dim
    query = tl.load(q + q_offsets, mask=(row[:, None] < WINDOW) & (dim < HEAD_DIM), other=0.0)
    position = tile + tl.arange(0, TILE)
    block = tl.load(block_table + position // BLOCK_SIZE, position < end, other=0)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    k_offsets = (slot[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim
    key = tl.load(k_cache + k_offsets, mask=(position < end)[:, None] & (dim < HEAD_DIM), other=0.0)
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * log2_scale
    seen = (position[None, :] <= kv_len - WINDOW + row[:, None]) & (position < end)[None, :] & (row < WINDOW)[:, None]
    return tl.where(seen, logits, float("-inf"))


@jit(do_not_specialize=["block_table", "kv_len", "num_blocks", "splits", "split_size"])
def _lse_kernel(
    q,
    k_cache,
    block_table,
    lse,
    kv_len,
    log2_scale,
    q_stride_layer,
    num_blocks,
    splits,
    split_size,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Log-sum-exp, base 2, of each window query of one head over one split of the keys."""
    head, split, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += layer * q_stride_layer
    k_cache += layer * num_blocks * (BLOCK_SIZE * KV_HEADS * HEAD_DIM)
    maximum = tl.full((WINDOW_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((WINDOW_PADDED,), tl.float32)
    end = tl.minimum((split + 1) * split_size, kv_len)
    for tile in range(split * split_size, end, TILE):
        logits = _rows_and_tile(
            q, k_cache, block_table, head, head // (HEADS // KV_HEADS), kv_len, tile, end, log2_scale,
            KV_HEADS, HEADS, WINDOW, WINDOW_PADDED, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_SIZE, TILE,
        )  # fmt: skip
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
        base = tl.where(new_maximum > float("-inf"), new_maximum, 0.0)
        total = total * tl.exp2(maximum - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
        maximum = new_maximum
    row = tl.arange(0, WINDOW_PADDED)
    out = ((layer * HEADS + head) * splits + split) * WINDOW + row
    log = tl.where(total > 0, maximum + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse + out, log, mask=row < WINDOW)


@jit(do_not_specialize=["block_table", "kv_len", "num_blocks"])
def _score_kernel(
    q,
    k_cache,
    block_table,
    lse,
    scores,
    kv_len,
    log2_scale,
    q_stride_layer,
    num_blocks,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """For one tile of keys: the sum over the window of each head's weights, the largest of the heads of a group."""
    tile, kv_head, layer = tl.program_id(0) * TILE, tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += layer * q_stride_layer
    k_cache += layer * num_blocks * (BLOCK_SIZE * KV_HEADS * HEAD_DIM)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row = tl.arange(0, WINDOW_PADDED)
    best = tl.zeros((TILE,), tl.float32)
    for i in range(GROUP):
        head = kv_head * GROUP + i
        logits = _rows_and_tile(
            q, k_cache, block_table, head, kv_head, kv_len, tile, kv_len, log2_scale,
            KV_HEADS, HEADS, WINDOW, WINDOW_PADDED, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_SIZE, TILE,
        )  # fmt: skip
        own = tl.load(lse + (layer * HEADS + head) * WINDOW + row, mask=row < WINDOW, other=0.0)
        best = tl.maximum(best, tl.sum(tl.exp2(logits - own[:, None]), axis=0))
    position = tile + tl.arange(0, TILE)
    tl.store(scores + (layer * KV_HEADS + kv_head) * kv_len + position, best, mask=position < kv_len)


def _window_scores_triton(
    q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor, kv_len: int, scale: float
) -> torch.Tensor:
    layers, window, num_heads, head_dim = q.shape
    _, num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    splits = max(1, kv_len // MIN_SPLIT)
    split_size = triton.cdiv(kv_len, splits * TILE) * TILE
    lse = torch.empty((layers, num_heads, splits, window), dtype=torch.float32, device=q.device)
    scores = torch.empty((layers, num_kv_heads, kv_len), dtype=torch.float32, device=q.device)
    inputs, log2_scale = (q, k_cache, block_table), scale * 1.4426950408889634
    sizes = {
        "KV_HEADS": num_kv_heads,
        "HEADS": num_heads,
        "WINDOW": window,
        "WINDOW_PADDED": max(16, triton.next_power_of_2(window)),
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": triton.next_power_of_2(head_dim),
        "BLOCK_SIZE": block_size,
        "TILE": TILE,
    }
    grid = (num_heads, splits, layers)
    _lse_kernel[grid](*inputs, lse, kv_len, log2_scale, q.stride(0), num_blocks, splits, split_size, **sizes)
    grid = (triton.cdiv(kv_len, TILE), num_kv_heads, layers)
    _score_kernel[grid](*inputs, _join(lse), scores, kv_len, log2_scale, q.stride(0), num_blocks, **sizes)
    return scores


def _join(lse: torch.Tensor) -> torch.Tensor:
    """[L, Hq, splits, w] → [L, Hq, w], base 2."""
    maximum = lse.amax(dim=2, keepdim=True)
    return ((lse - maximum).exp2_().sum(dim=2).log2_() + maximum.squeeze(2)).contiguous()


def window_scores(
    q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor, kv_len: int, scale: float
) -> torch.Tensor:
    """How much a prompt's last queries attend to each of its keys, in L layers: [L, Hkv, kv_len] float32.

    q: [L, w, Hq, D], rotated queries of the last w ≤ kv_len tokens, contiguous within a layer; they attend causally,
    softmax in float32. A key's score is the sum of its weights over the w queries, the largest over the query heads of
    its KV group. k_cache: [L, num_blocks, block_size, Hkv, D], contiguous; block_table: int32, the prompt's blocks and
    anything after them. Nothing of size w × kv_len is written.
    """
    op = _window_scores_triton if q.is_cuda else window_scores_reference
    return op(q, k_cache, block_table, kv_len, scale)


def select_kept(scores: torch.Tensor, num_kept: int, *, sinks: int, window: int, pool_width: int) -> torch.Tensor:
    """The keys that each KV head of each layer keeps: [L, Hkv, num_kept] int64, ascending.

    scores: [L, Hkv, kv_len] float32, finite, max-pooled here over `pool_width` neighbours (odd; 1 pools nothing). The
    first `sinks` and the last `window` keys are always kept, no more than `num_kept` together; ties go to the lower
    index.
    """
    pooled = F.max_pool1d(scores, pool_width, stride=1, padding=pool_width // 2)
    pooled[..., :sinks] = torch.inf
    pooled[..., pooled.shape[-1] - window :] = torch.inf
    last = pooled.topk(num_kept, sorted=False).values.amin(dim=-1, keepdim=True)
    above, tied = pooled > last, pooled == last
    room = num_kept - above.sum(dim=-1, keepdim=True)
    is_kept = above | (tied & (tied.cumsum(dim=-1) <= room))
    places = is_kept.flatten().nonzero_static(size=num_kept * last.numel())  # unlike nonzero, it waits for no GPU
    return (places % scores.shape[-1]).view(*scores.shape[:-1], num_kept)


def compact_kv_reference(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    kept: torch.Tensor,
    new_table: torch.Tensor,
) -> None:
    """See `compact_kv`."""
    block_size = k_cache.shape[2]
    place = torch.arange(kept.shape[-1], device=kept.device)
    new = new_table.long()[place // block_size] * block_size + place % block_size
    old = block_table.long()[kept // block_size] * block_size + kept % block_size
    for cache in (k_cache, v_cache):
        for layer, slots in zip(cache.flatten(1, 2), old, strict=True):
            for head, own in enumerate(slots):
                layer[new, head] = layer[own, head]


@jit(do_not_specialize=["block_table", "num_blocks", "num_kept"])
def _compact_kernel(
    k_cache,
    v_cache,
    block_table,
    kept,
    new_table,
    num_blocks,
    num_kept,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Moves one tile of what one KV head keeps in one layer."""
    tile, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = tile * TILE + tl.arange(0, TILE)
    mask = place < num_kept
    position = tl.load(kept + (layer * KV_HEADS + head) * num_kept + place, mask=mask, other=0)
    old = tl.load(block_table + position // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
    new = tl.load(new_table + place // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
    dim = tl.arange(0, HEAD_DIM_PADDED)[None, :]
    layer_start = layer * num_blocks * (BLOCK_SIZE * KV_HEADS * HEAD_DIM)
    old = layer_start + ((old * BLOCK_SIZE + position % BLOCK_SIZE)[:, None] * KV_HEADS + head) * HEAD_DIM + dim
    new = layer_start + ((new * BLOCK_SIZE + place % BLOCK_SIZE)[:, None] * KV_HEADS + head) * HEAD_DIM + dim
    mask = mask[:, None] & (dim < HEAD_DIM)
    tl.store(k_cache + new, tl.load(k_cache + old, mask=mask), mask=mask)
    tl.store(v_cache + new, tl.load(v_cache + old, mask=mask), mask=mask)


def _compact_kv_triton(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    kept: torch.Tensor,
    new_table: torch.Tensor,
) -> None:
    layers, num_kv_heads, num_kept = kept.shape
    _, num_blocks, block_size, _, head_dim = k_cache.shape
    _compact_kernel[(triton.cdiv(num_kept, TILE), num_kv_heads, layers)](
        k_cache,
        v_cache,
        block_table,
        kept,
        new_table,
        num_blocks,
        num_kept,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        TILE=TILE,
    )


def compact_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    kept: torch.Tensor,
    new_table: torch.Tensor,
) -> None:
    """Copies a prompt's tokens `kept[l, h]`, keys and values of layer l and head h, into slots 0, 1, … of `new_table`.

    k_cache, v_cache: [L, num_blocks, block_size, Hkv, D], contiguous. block_table, new_table: int32, with no block in
    common. kept: [L, Hkv, K] int64, contiguous.
    """
    op = _compact_kv_triton if k_cache.is_cuda else compact_kv_reference
    op(k_cache, v_cache, block_table, kept, new_table)
