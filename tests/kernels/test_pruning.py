"""Pruning: references against loops written from the definition, kernels against references."""

from __future__ import annotations

import pytest
import torch
from kernel_testing import assert_close, poisoned
from rayllm_kernels import select_kept
from rayllm_kernels.pruning import (
    _compact_kv_triton,
    _window_scores_triton,
    compact_kv_reference,
    window_scores_reference,
)
from test_attention import Batch, make_batch

SINKS = 4


def window_of(batch: Batch, window: int) -> torch.Tensor:
    """[P, w, Hq, D]"""
    return batch.q.unflatten(0, (len(batch.keys), window))


def score_args(batch: Batch, window: int, longer: int = 0) -> tuple:
    longest = int(batch.kv_lens.max()) + longer
    return window_of(batch, window), batch.k_cache, batch.block_tables, batch.kv_lens, batch.scale, longest


def naive_scores(batch: Batch, window: int) -> list[torch.Tensor]:
    """Of each prompt [Hkv, kv_len] in float64, one query and one head after the other."""
    found = []
    for q, keys in zip(window_of(batch, window).double(), batch.keys, strict=True):
        kv_len, num_kv_heads, _ = keys.shape
        scores = torch.zeros(num_kv_heads, kv_len, dtype=torch.float64)
        group = q.shape[1] // num_kv_heads
        for head in range(q.shape[1]):
            summed = torch.zeros(kv_len, dtype=torch.float64)
            for i in range(window):
                seen = kv_len - window + i + 1
                logits = keys[:seen, head // group].double() @ q[i, head] * batch.scale
                summed[:seen] += logits.softmax(0).cpu()
            scores[head // group] = torch.maximum(scores[head // group], summed)
        found.append(scores)
    return found


def naive_kept(scores: torch.Tensor, num_kept: int, window: int, pool_width: int) -> list[list[int]]:
    """Of each KV head, from the definition: sinks, window, then the best pooled scores, ties to the lower index."""
    kept = []
    for row in scores.tolist():
        reach = pool_width // 2
        pooled = [max(row[max(0, i - reach) : i + reach + 1]) for i in range(len(row))]
        always = {*range(SINKS), *range(len(row) - window, len(row))}
        rest = sorted((i for i in range(len(row)) if i not in always), key=lambda i: (-pooled[i], i))
        kept.append(sorted([*always, *rest[: num_kept - len(always)]]))
    return kept


@pytest.mark.parametrize(("kv_lens", "window"), [([70, 33, 8], 8), ([40], 32), ([5], 5)])
def test_scores_reference(kv_lens: list[int], window: int) -> None:
    batch = make_batch(kv_lens, [window] * len(kv_lens), heads=(6, 2), head_dim=24, block_size=8)
    scores = window_scores_reference(*score_args(batch, window, longer=3))
    for own, expected in zip(scores, naive_scores(batch, window), strict=True):
        assert_close(own[:, : expected.shape[1]], expected)
        assert not own[:, expected.shape[1] :].any()


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "window"),
    [((4, 2), 32, 16, 8), ((9, 3), 64, 4, 32), ((8, 1), 96, 32, 5), ((2, 2), 128, 128, 64)],
)
def test_scores_triton(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, block_size: int, window: int
) -> None:
    kv_lens = [*torch.randint(window, 300, (2,)).tolist(), window, 130]
    batch = make_batch(kv_lens, [window] * 4, heads, head_dim, block_size, dtype, device)
    args = score_args(batch, window, longer=70)
    with poisoned():
        scores = _window_scores_triton(*args)
    assert_close(scores, window_scores_reference(*args), tolerance=1e-4 if dtype == torch.float32 else 2e-2)


def test_scores_triton_of_split_keys(device: torch.device) -> None:
    batch = make_batch([5000, 40, 2100], [8] * 3, (2, 1), 16, 64, torch.float32, device)
    args = score_args(batch, 8)
    with poisoned():
        scores = _window_scores_triton(*args)
    assert_close(scores, window_scores_reference(*args), tolerance=1e-4)


@pytest.mark.parametrize("pool_width", [1, 5, 15])
def test_selection(pool_width: int) -> None:
    kv_lens, num_kept, window = [90, 61, 30], [40, 20, 29], 8
    scores = torch.randint(0, 12, (3, 2, 90)) / 4.0  # many ties
    for row, kv_len in enumerate(kv_lens):
        scores[row, :, kv_len:] = 0
    lens, counts = torch.tensor(kv_lens), torch.tensor(num_kept)
    kept = select_kept(scores, lens, counts, 40, sinks=SINKS, window=window, pool_width=pool_width)
    assert kept.shape == (3, 2, 40)
    for row, (kv_len, count) in enumerate(zip(kv_lens, num_kept, strict=True)):
        assert kept[row, :, :count].tolist() == naive_kept(scores[row, :, :kv_len], count, window, pool_width)
        assert (kept[row, :, count:] == 90).all()


@pytest.mark.parametrize("op", ["reference", "triton"])
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [((4, 2), 24, 8), ((3, 3), 64, 16), ((8, 1), 128, 64)])
def test_compaction(
    device: torch.device, dtype: torch.dtype, op: str, heads: tuple[int, int], head_dim: int, block_size: int
) -> None:
    """What is kept lies in the new blocks, in order; nothing else is written."""
    kv_lens, num_kept = [150, 70, 9], [66, 70, 1]
    batch = make_batch(kv_lens, [1] * 3, heads, head_dim, block_size, dtype, device, unused=0.0)
    num_kv_heads = heads[1]
    kept = torch.full((3, num_kv_heads, 70), 150, device=device)
    for row, (kv_len, count) in enumerate(zip(kv_lens, num_kept, strict=True)):
        for head in range(num_kv_heads):
            kept[row, head, :count] = torch.randperm(kv_len, device=device)[:count].sort().values
    num_blocks = len(batch.k_cache)
    caches = [
        torch.cat((cache, torch.zeros_like(cache), torch.zeros_like(cache))) for cache in (batch.k_cache, batch.v_cache)
    ]
    width = -(-70 // block_size)
    new = num_blocks + torch.randperm(2 * num_blocks)[: 3 * width].view(3, width).int().to(device)
    before = [cache.clone() for cache in caches]
    run = _compact_kv_triton if op == "triton" else compact_kv_reference
    run(*caches, batch.block_tables, kept, torch.tensor(num_kept, device=device), new)
    for cache, old, sequences in zip(caches, before, (batch.keys, batch.values), strict=True):
        expected = old.clone()
        for row, count in enumerate(num_kept):
            for head in range(num_kv_heads):
                for place in range(count):
                    block = int(new[row, place // block_size])
                    expected[block, place % block_size, head] = sequences[row][kept[row, head, place], head]
        assert torch.equal(cache, expected)
