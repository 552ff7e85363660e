"""Norm, rotary embedding, activation, KV store: references against plain arithmetic, Triton against them."""

from __future__ import annotations

import pytest
import torch
from kernel_testing import assert_close, poisoned
from rayllm_kernels import apply_rope, linear, pack_weight, rms_norm, silu_and_mul, store_kv
from rayllm_kernels.activation import _silu_and_mul_triton
from rayllm_kernels.norm import _rms_norm_triton
from rayllm_kernels.rope import _apply_rope_triton
from rayllm_kernels.store_kv import _store_kv_triton
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

ALL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rope_cache(max_positions: int, head_dim: int) -> torch.Tensor:
    angles = torch.arange(max_positions)[:, None] * 10_000 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    return torch.cat((angles.cos(), angles.sin()), dim=1)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_rms_norm_is_the_formula(dtype: torch.dtype) -> None:
    x, residual, weight = (
        torch.randn(3, 5, 40, dtype=dtype),
        torch.randn(3, 5, 40, dtype=dtype),
        torch.rand(40),
    )
    weight = weight.to(dtype)

    def formula(x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        return x / (x.pow(2).sum(-1, keepdim=True) / 40 + 1e-3).sqrt() * weight.double()

    assert_close(rms_norm(x, weight, 1e-3), formula(x))
    normalised, new_residual = rms_norm(x, weight, 1e-3, residual)
    assert torch.equal(new_residual, x + residual)
    assert_close(normalised, formula(x + residual))


@pytest.mark.parametrize("shape", [(1, 576), (7, 100), (2, 3000), (33, 128), (0, 64)])
def test_rms_norm_triton(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual, weight = (torch.randn(s, dtype=dtype, device=device) for s in (shape, shape, shape[-1:]))
    with poisoned():
        out = _rms_norm_triton(x, weight, 1e-5)
        fused, new_residual = _rms_norm_triton(x, weight, 1e-5, residual)
    assert_close(out, rms_norm(x.cpu(), weight.cpu(), 1e-5).to(device))
    expected, expected_residual = rms_norm(x.cpu(), weight.cpu(), 1e-5, residual.cpu())
    assert_close(fused, expected.to(device))
    assert_close(new_residual, expected_residual.to(device))


def test_rms_norm_triton_over_heads_of_a_view(device: torch.device, dtype: torch.dtype) -> None:
    qkv = torch.randn(9, 8, 48, dtype=dtype, device=device)
    q, weight = qkv[:, 2:7], torch.randn(48, dtype=dtype, device=device)
    with poisoned():
        out = _rms_norm_triton(q, weight, 1e-6)
    assert out.is_contiguous()
    assert_close(out, rms_norm(q.cpu(), weight.cpu(), 1e-6).to(device))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_rope_is_hugging_faces(dtype: torch.dtype) -> None:
    q, k = torch.randn(11, 6, 32, dtype=dtype), torch.randn(11, 2, 32, dtype=dtype)
    positions, cache = torch.randint(0, 500, (11,)), rope_cache(500, 32)
    cos, sin = (part.repeat(1, 2).double() for part in cache[positions].chunk(2, dim=-1))
    expected = apply_rotary_pos_emb(q.double(), k.double(), cos, sin, unsqueeze_dim=1)
    for actual, wanted in zip(apply_rope(q, k, positions, cache), expected, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, wanted)


def test_rope_normalises_heads_first() -> None:
    q, k, weights = torch.randn(11, 6, 32), torch.randn(11, 2, 32), torch.rand(2, 32)
    positions, cache = torch.randint(0, 500, (11,)), rope_cache(500, 32)
    normed = rms_norm(q, weights[0], 1e-2), rms_norm(k, weights[1], 1e-2)
    expected = apply_rope(*normed, positions, cache)
    for actual, wanted in zip(apply_rope(q, k, positions, cache, (*weights, 1e-2)), expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("q_heads", "k_heads", "head_dim"), [(9, 3, 64), (4, 4, 24), (1, 1, 128)])
def test_rope_triton_on_views(
    device: torch.device, dtype: torch.dtype, q_heads: int, k_heads: int, head_dim: int, normed: bool
) -> None:
    qkv = torch.randn(7, q_heads + 2 * k_heads, head_dim, dtype=dtype, device=device)
    untouched = qkv[:, q_heads + k_heads :].clone()
    q, k, v = qkv.split((q_heads, k_heads, k_heads), dim=1)
    positions = torch.randint(0, 300, (7,), device=device)
    cache = rope_cache(300, head_dim).to(device)
    q_weight, k_weight = torch.rand(2, head_dim, dtype=dtype, device=device) + 0.5
    norms = (q_weight, k_weight, 1e-5) if normed else None
    cpu_norms = (q_weight.cpu(), k_weight.cpu(), 1e-5) if normed else None
    expected = apply_rope(q.cpu(), k.cpu(), positions.cpu(), cache.cpu(), cpu_norms)
    for actual, wanted in zip(_apply_rope_triton(q, k, positions, cache, norms), expected, strict=True):
        assert_close(actual, wanted.to(device))
    assert torch.equal(v, untouched)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_silu_and_mul_is_the_formula(dtype: torch.dtype) -> None:
    x = torch.randn(4, 30, dtype=dtype)
    gate, up = x[:, :15].double(), x[:, 15:].double()
    assert_close(silu_and_mul(x), gate / (1 + (-gate).exp()) * up)


@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (5, 33), (2, 1024), (0, 8)])
def test_silu_and_mul_triton(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> None:
    x = torch.randn(rows, 2 * width + 16, dtype=dtype, device=device)[:, : 2 * width]
    with poisoned():
        out = _silu_and_mul_triton(x)
    assert_close(out, silu_and_mul(x.cpu()).to(device))


def stored(op, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, block_size: int) -> list[torch.Tensor]:
    """The caches of 6 blocks, before NaN everywhere, after `op` has stored k and v."""
    caches = [torch.full((6, block_size, *k.shape[1:]), torch.nan, dtype=k.dtype, device=k.device) for _ in "kv"]
    op(k, v, *caches, slots)
    return caches


def test_store_kv_writes_its_slots_and_no_other() -> None:
    kv = torch.randn(9, 7, 20)
    k, v = kv[:, 1:4], kv[:, 4:]
    slots = torch.randperm(24)[:9]
    slots[3] = slots[8] = -1
    for new, cache in zip((k, v), stored(store_kv, k, v, slots, block_size=4), strict=True):
        for slot in range(24):
            row = cache[slot // 4, slot % 4]
            if slot in slots:
                assert torch.equal(row, new[slots.tolist().index(slot)])
            else:
                assert row.isnan().all()


@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [(3, 64, 16), (1, 80, 4), (2, 17, 8)])
def test_store_kv_triton(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, block_size: int) -> None:
    kv = torch.randn(11, 1 + 2 * heads, head_dim, dtype=dtype, device=device)
    k, v = kv[:, 1 : 1 + heads], kv[:, 1 + heads :]
    slots = torch.randperm(6 * block_size)[:11]
    slots[torch.randint(11, (3,))] = -1
    actual = stored(_store_kv_triton, k, v, slots.to(device), block_size)
    expected = stored(store_kv, k.cpu(), v.cpu(), slots, block_size)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [0, 1, 8, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_with_a_packed_weight(rows: int, has_bias: bool) -> None:
    x, weight = torch.randn(rows, 96), torch.randn(50, 96)
    bias = torch.randn(50) if has_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_close(linear(x, pack_weight(weight), bias), expected)
    assert_close(linear(x, weight, bias), expected)
