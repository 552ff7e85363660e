"""Pruning: references against loops written from the definition, kernels against references."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernel_testing import assert_close, poisoned
from rayllm_kernels import pruning, select_kept
from rayllm_kernels.pruning import (
    _compact_kv_triton,
    _window_scores_triton,
    compact_kv_reference,
    window_scores_reference,
)

LAYERS = 2
SINKS = 4
GARBAGE = 2**30  # a block far outside of any cache: reading it fails


@dataclass
class Prompt:
    """One prompt in the KV cache of several layers."""

    q: torch.Tensor  # [L, w, Hq, D], of the last w tokens; as in the engine, layers do not follow each other
    keys: torch.Tensor  # [L, kv_len, Hkv, D]
    values: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    kv_len: int
    scale: float

    @property
    def score_args(self) -> tuple:
        return self.q, self.k_cache, self.block_table, self.kv_len, self.scale


def make_prompt(
    kv_len: int,
    window: int,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    unused: float = torch.nan,
    spare_blocks: int = 3,
) -> Prompt:
    """Random tensors; slots that hold no key are `unused`, and the table goes on with garbage."""
    layers, num_blocks = LAYERS, -(-kv_len // block_size)
    order = torch.randperm(num_blocks + spare_blocks)[:num_blocks]
    slots = (order[:, None] * block_size + torch.arange(block_size)).flatten()[:kv_len].to(device)
    kv, caches = [], []
    for _ in "kv":
        content = torch.randn(layers, kv_len, heads[1], head_dim, dtype=dtype, device=device)
        shape = (layers, num_blocks + spare_blocks, block_size, heads[1], head_dim)
        cache = torch.full(shape, unused, dtype=dtype, device=device)
        cache.flatten(1, 2)[:, slots] = content
        kv.append(content)
        caches.append(cache)
    q = torch.randn(layers, 2, window, heads[0], head_dim, dtype=dtype, device=device)[:, 1]
    table = torch.cat((order, torch.tensor([GARBAGE, GARBAGE]))).int().to(device)
    return Prompt(q, *kv, *caches, table, kv_len, scale=float(torch.rand(1) + 0.5) / head_dim**0.5)


def naive_scores(prompt: Prompt) -> torch.Tensor:
    """[L, Hkv, kv_len] in float64, one query and one head after the other."""
    layers, window, num_heads, _ = prompt.q.shape
    kv_len, num_kv_heads = prompt.kv_len, prompt.keys.shape[2]
    scores = torch.zeros(layers, num_kv_heads, kv_len, dtype=torch.float64)
    for layer, (q, keys) in enumerate(zip(prompt.q.double(), prompt.keys.double(), strict=True)):
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            summed = torch.zeros(kv_len, dtype=torch.float64)
            for i in range(window):
                seen = kv_len - window + i + 1
                summed[:seen] += (keys[:seen, kv_head] @ q[i, head] * prompt.scale).softmax(0)
            scores[layer, kv_head] = torch.maximum(scores[layer, kv_head], summed)
    return scores


def naive_kept(scores: torch.Tensor, num_kept: int, window: int, pool_width: int) -> list[list[int]]:
    """What each KV head keeps, by definition: sinks, window, then the best pooled scores, ties to the lower index."""
    kept = []
    for row in scores.tolist():
        reach = pool_width // 2
        pooled = [max(row[max(0, i - reach) : i + reach + 1]) for i in range(len(row))]
        always = {*range(SINKS), *range(len(row) - window, len(row))}
        rest = sorted((i for i in range(len(row)) if i not in always), key=lambda i: (-pooled[i], i))
        kept.append(sorted([*always, *rest[: num_kept - len(always)]]))
    return kept


@pytest.mark.parametrize(("kv_len", "window"), [(70, 8), (40, 32), (8, 8), (5, 5)])
def test_scores_reference(kv_len: int, window: int) -> None:
    prompt = make_prompt(kv_len, window, heads=(6, 2), head_dim=24, block_size=8)
    assert_close(window_scores_reference(*prompt.score_args), naive_scores(prompt))


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "window", "longer"),
    [
        pytest.param(*shape, longer, marks=[] if longer in interpreted else [pytest.mark.slow])
        for *shape, interpreted in (
            ((4, 2), 32, 16, 8, (0, 150)),
            ((9, 3), 64, 4, 32, (1, 66)),
            ((8, 1), 96, 32, 5, (0, 66)),
            ((2, 2), 128, 128, 64, (1, 150)),
        )
        for longer in (0, 1, 66, 150, 230)
    ],
)
def test_scores_triton(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    window: int,
    longer: int,
) -> None:
    prompt = make_prompt(window + longer, window, heads, head_dim, block_size, dtype, device)
    with poisoned():
        scores = _window_scores_triton(*prompt.score_args)
    expected = window_scores_reference(*prompt.score_args)
    assert_close(scores, expected, tolerance=1e-4 if dtype == torch.float32 else 2e-2)


def test_scores_triton_of_split_keys(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "MIN_SPLIT", 128)
    prompt = make_prompt(450, 8, (4, 2), 16, 64, torch.float32, device)
    with poisoned():
        scores = _window_scores_triton(*prompt.score_args)
    assert_close(scores, window_scores_reference(*prompt.score_args), tolerance=1e-4)


@pytest.mark.parametrize("pool_width", [1, 5, 15])
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize(("kv_len", "num_kept"), [(90, 40), (50, 50), (16, 12), (77, 76)])
@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_selection(kv_len: int, num_kept: int, window: int, pool_width: int, place: str) -> None:
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    scores = torch.randint(0, 12, (3, 2, kv_len)) / 4.0  # many ties
    with poisoned():
        kept = select_kept(scores.to(place), num_kept, sinks=SINKS, window=window, pool_width=pool_width)
    assert kept.is_contiguous()
    for own, layer in zip(kept.tolist(), scores, strict=True):
        assert own == naive_kept(layer, num_kept, window, pool_width)


@pytest.mark.parametrize("op", ["reference", "triton"])
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [((4, 2), 24, 8), ((3, 3), 64, 16), ((8, 1), 128, 64)])
@pytest.mark.parametrize(("kv_len", "num_kept"), [(150, 66), (70, 70), (9, 1)])
def test_compaction(
    device: torch.device,
    dtype: torch.dtype,
    op: str,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    kv_len: int,
    num_kept: int,
) -> None:
    """What is kept lies in the new blocks, in order; nothing else is written."""
    num_new = -(-num_kept // block_size)
    prompt = make_prompt(kv_len, 1, heads, head_dim, block_size, dtype, device, unused=0.0, spare_blocks=num_new + 3)
    num_kv_heads = heads[1]
    kept = torch.stack([torch.randperm(kv_len)[:num_kept].sort().values for _ in range(LAYERS * num_kv_heads)])
    kept = kept.view(LAYERS, num_kv_heads, num_kept).to(device)
    used = prompt.block_table[:-2].tolist()
    spare = [block for block in torch.randperm(prompt.k_cache.shape[1]).tolist() if block not in used]
    new = torch.tensor(spare[:num_new], dtype=torch.int32, device=device)
    caches = prompt.k_cache, prompt.v_cache
    before = [cache.clone() for cache in caches]
    run = _compact_kv_triton if op == "triton" else compact_kv_reference
    run(*caches, prompt.block_table, kept, new)
    for cache, expected, content in zip(caches, before, (prompt.keys, prompt.values), strict=True):
        for layer in range(LAYERS):
            for head in range(num_kv_heads):
                for place in range(num_kept):
                    slot = layer, int(new[place // block_size]), place % block_size, head
                    expected[slot] = content[layer, kept[layer, head, place], head]
        assert torch.equal(cache, expected)
