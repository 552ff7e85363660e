"""Pruning of the KV cache: how much a prompt's last queries attend to each key, which keys are kept, and the move of
what is kept into blocks of its own (SnapKV, arXiv:2404.14469)."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import torch.nn.functional as F

from rayllm_kernels._triton import jit, tl, triton

TILE = 64
"""Keys in a program's tile."""
MIN_SPLIT = 2048
"""Keys of a sequence that one program takes, at least."""


def window_scores_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    max_kv_len: int,
) -> torch.Tensor:
    """See `window_scores`."""
    num_prompts, window, num_heads, _ = q.shape
    num_kv_heads = k_cache.shape[2]
    scores = q.new_zeros((num_prompts, num_kv_heads, max_kv_len), dtype=torch.float32)
    for row, kv_len in enumerate(kv_lens.tolist()):
        blocks = block_tables[row, : -(-kv_len // k_cache.shape[1])]
        keys = k_cache.index_select(0, blocks).flatten(0, 1)[:kv_len]
        grouped = q[row].unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
        logits = torch.einsum("whgd,khd->hgwk", grouped.float(), keys.float()) * scale
        causal = torch.ones(window, kv_len, dtype=torch.bool, device=q.device).tril_(kv_len - window)
        weights = logits.masked_fill_(~causal, -torch.inf).softmax(dim=-1)
        scores[row, :, :kv_len] = weights.sum(dim=2).amax(dim=1)
    return scores


@jit
def _rows_and_tile(
    q,
    k_cache,
    block_tables,
    prompt,
    kv_head,
    head,
    kv_len,
    tile,
    end,
    table_stride,
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
    q_offsets = ((prompt.to(tl.int64) * WINDOW + row[:, None]) * HEADS + head) * HEAD_DIM + dim
    query = tl.load(q + q_offsets, mask=(row[:, None] < WINDOW) & (dim < HEAD_DIM), other=0.0)
    position = tile + tl.arange(0, TILE)
    block = tl.load(block_tables + prompt.to(tl.int64) * table_stride + position // BLOCK_SIZE, position < end, other=0)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    k_offsets = (slot[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim
    key = tl.load(k_cache + k_offsets, mask=(position < end)[:, None] & (dim < HEAD_DIM), other=0.0)
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * log2_scale
    seen = (position[None, :] <= kv_len - WINDOW + row[:, None]) & (position < end)[None, :] & (row < WINDOW)[:, None]
    return tl.where(seen, logits, float("-inf"))


@jit(do_not_specialize=["table_stride", "splits", "split_size"])
def _lse_kernel(
    q,
    k_cache,
    block_tables,
    kv_lens,
    lse,
    log2_scale,
    table_stride,
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
    head, prompt, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_len = tl.load(kv_lens + prompt)
    kv_head = head // (HEADS // KV_HEADS)
    maximum = tl.full((WINDOW_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((WINDOW_PADDED,), tl.float32)
    end = tl.minimum((split + 1) * split_size, kv_len)
    for tile in range(split * split_size, end, TILE):
        logits = _rows_and_tile(
            q, k_cache, block_tables, prompt, kv_head, head, kv_len, tile, end, table_stride, log2_scale,
            KV_HEADS, HEADS, WINDOW, WINDOW_PADDED, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_SIZE, TILE,
        )  # fmt: skip
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
        base = tl.where(new_maximum > float("-inf"), new_maximum, 0.0)
        total = total * tl.exp2(maximum - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
        maximum = new_maximum
    row = tl.arange(0, WINDOW_PADDED)
    out = ((prompt.to(tl.int64) * HEADS + head) * splits + split) * WINDOW + row
    log = tl.where(total > 0, maximum + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse + out, log, mask=row < WINDOW)


@jit(do_not_specialize=["table_stride", "max_kv_len"])
def _score_kernel(
    q,
    k_cache,
    block_tables,
    kv_lens,
    lse,
    scores,
    log2_scale,
    table_stride,
    max_kv_len,
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
    tile, kv_head, prompt = tl.program_id(0) * TILE, tl.program_id(1), tl.program_id(2)
    kv_len = tl.load(kv_lens + prompt)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row = tl.arange(0, WINDOW_PADDED)
    best = tl.zeros((TILE,), tl.float32)
    if tile < kv_len:
        for i in range(GROUP):
            head = kv_head * GROUP + i
            logits = _rows_and_tile(
                q, k_cache, block_tables, prompt, kv_head, head, kv_len, tile, kv_len, table_stride, log2_scale,
                KV_HEADS, HEADS, WINDOW, WINDOW_PADDED, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_SIZE, TILE,
            )  # fmt: skip
            own = tl.load(lse + (prompt.to(tl.int64) * HEADS + head) * WINDOW + row, mask=row < WINDOW, other=0.0)
            best = tl.maximum(best, tl.sum(tl.exp2(logits - own[:, None]), axis=0))
    position = tile + tl.arange(0, TILE)
    out = (prompt.to(tl.int64) * KV_HEADS + kv_head) * max_kv_len + position
    tl.store(scores + out, best, mask=position < max_kv_len)


def _window_scores_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    max_kv_len: int,
) -> torch.Tensor:
    num_prompts, window, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    splits = max(1, max_kv_len // MIN_SPLIT)
    split_size = -(-max_kv_len // (splits * TILE)) * TILE
    lse = torch.empty((num_prompts, num_heads, splits, window), dtype=torch.float32, device=q.device)
    scores = torch.empty((num_prompts, num_kv_heads, max_kv_len), dtype=torch.float32, device=q.device)
    inputs = (q.contiguous(), k_cache, block_tables, kv_lens)
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
    log2_scale, stride = scale * 1.4426950408889634, block_tables.stride(0)
    grid = (num_heads, num_prompts, splits)
    _lse_kernel[grid](*inputs, lse, log2_scale, stride, splits, split_size, **sizes)
    grid = (triton.cdiv(max_kv_len, TILE), num_kv_heads, num_prompts)
    _score_kernel[grid](*inputs, _join(lse), scores, log2_scale, stride, max_kv_len, **sizes)
    return scores


def _join(lse: torch.Tensor) -> torch.Tensor:
    """[P, Hq, splits, w] → [P, Hq, w], base 2."""
    maximum = lse.amax(dim=2, keepdim=True)
    return ((lse - maximum).exp2_().sum(dim=2).log2_() + maximum.squeeze(2)).contiguous()


def window_scores(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    max_kv_len: int,
) -> torch.Tensor:
    """How much the last queries of each prompt attend to each of its keys: [P, Hkv, max_kv_len] float32.

    q: [P, w, Hq, D], rotated queries of the last w tokens; they attend causally, softmax in float32. A key's score
    is the sum of its weights over the w queries, the largest over the query heads of its KV group; 0 past the end.
    k_cache: [num_blocks, block_size, Hkv, D]; block_tables: [P, M] int32; kv_lens: [P] int32, each at least w.
    Nothing of size w × kv_len is written.
    """
    op = _window_scores_triton if q.is_cuda else window_scores_reference
    return op(q, k_cache, block_tables, kv_lens, scale, max_kv_len)


def select_kept(
    scores: torch.Tensor,
    kv_lens: torch.Tensor,
    num_kept: torch.Tensor,
    most: int,
    *,
    sinks: int,
    window: int,
    pool_width: int,
) -> torch.Tensor:
    """The keys that each KV head keeps: [P, Hkv, most] int64, ascending; `most` is the largest of `num_kept`.

    scores: [P, Hkv, L] float32, at least 0, max-pooled here over `pool_width` neighbours (odd; 1 pools nothing).
    kv_lens, num_kept: [P] int64. The first `sinks` and the last `window` keys are always kept; ties go to the lower
    index. Entries from `num_kept` on are L.
    """
    longest = scores.shape[-1]
    pooled = F.max_pool1d(scores, pool_width, stride=1, padding=pool_width // 2)
    position = torch.arange(longest, device=scores.device)
    ends = kv_lens[:, None, None]
    pooled.masked_fill_((position < sinks) | (position >= ends - window), torch.inf).masked_fill_(position >= ends, -1)
    best = pooled.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    rank = torch.arange(most, device=scores.device)
    return best.masked_fill_(rank >= num_kept[:, None, None], longest).sort(dim=-1).values


def compact_kv_reference(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kept: torch.Tensor,
    num_kept: torch.Tensor,
    new_tables: torch.Tensor,
) -> None:
    """See `compact_kv`."""
    block_size = k_cache.shape[1]
    for row, count in enumerate(num_kept.tolist()):
        place = torch.arange(count, device=kept.device)
        new = new_tables[row].long()[place // block_size] * block_size + place % block_size
        for head, positions in enumerate(kept[row, :, :count]):
            old = block_tables[row].long()[positions // block_size] * block_size + positions % block_size
            for cache in (k_cache, v_cache):
                flat = cache.view(-1, *cache.shape[2:])
                flat[new, head] = flat[old, head]


@jit(do_not_specialize=["table_stride", "new_stride", "most"])
def _compact_kernel(
    k_cache,
    v_cache,
    block_tables,
    kept,
    num_kept,
    new_tables,
    table_stride,
    new_stride,
    most,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Moves one tile of what one KV head of one sequence keeps."""
    tile, head, prompt = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = tile * TILE + tl.arange(0, TILE)
    mask = place < tl.load(num_kept + prompt)
    position = tl.load(kept + (prompt * KV_HEADS + head) * most + place, mask=mask, other=0)
    old = tl.load(block_tables + prompt * table_stride + position // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
    new = tl.load(new_tables + prompt * new_stride + place // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
    dim = tl.arange(0, HEAD_DIM_PADDED)[None, :]
    old = ((old * BLOCK_SIZE + position % BLOCK_SIZE)[:, None] * KV_HEADS + head) * HEAD_DIM + dim
    new = ((new * BLOCK_SIZE + place % BLOCK_SIZE)[:, None] * KV_HEADS + head) * HEAD_DIM + dim
    mask = mask[:, None] & (dim < HEAD_DIM)
    tl.store(k_cache + new, tl.load(k_cache + old, mask=mask), mask=mask)
    tl.store(v_cache + new, tl.load(v_cache + old, mask=mask), mask=mask)


def _compact_kv_triton(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kept: torch.Tensor,
    num_kept: torch.Tensor,
    new_tables: torch.Tensor,
) -> None:
    num_prompts, num_kv_heads, most = kept.shape
    head_dim = k_cache.shape[-1]
    _compact_kernel[(triton.cdiv(most, TILE), num_kv_heads, num_prompts)](
        k_cache,
        v_cache,
        block_tables,
        kept,
        num_kept,
        new_tables,
        block_tables.stride(0),
        new_tables.stride(0),
        most,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=k_cache.shape[1],
        TILE=TILE,
    )


def compact_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kept: torch.Tensor,
    num_kept: torch.Tensor,
    new_tables: torch.Tensor,
) -> None:
    """Copies the first `num_kept[p]` of `kept[p, h]`, keys and values of head h, into slots 0, 1, … of `new_tables[p]`.

    k_cache, v_cache: [num_blocks, block_size, Hkv, D], contiguous. block_tables: [P, M], new_tables: [P, M2], int32,
    with no block in common. kept: [P, Hkv, K] int64, contiguous; num_kept: [P] int64.
    """
    op = _compact_kv_triton if k_cache.is_cuda else compact_kv_reference
    op(k_cache, v_cache, block_tables, kept, num_kept, new_tables)
