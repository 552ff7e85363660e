"""Norm, rotary embedding, activation, KV store: references against plain arithmetic, Triton against them."""

from __future__ import annotations

import pytest
import torch
from kernel_testing import assert_close, poisoned
from rayllm_kernels import Rope, linear, pack_weight, packed_linear, rms_norm, rope_and_store, silu_and_mul
from rayllm_kernels.activation import _silu_and_mul_triton
from rayllm_kernels.linear import _token_linear_triton, linear_reference
from rayllm_kernels.norm import _rms_norm_triton
from rayllm_kernels.rope import _rope_and_store_triton, apply_rope_reference
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
    for actual, wanted in zip(apply_rope_reference(q, k, Rope(positions, cache)), expected, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, wanted)


def test_rope_normalises_heads_first() -> None:
    q, k, weights = torch.randn(11, 6, 32), torch.randn(11, 2, 32), torch.rand(2, 32)
    positions, cache = torch.randint(0, 500, (11,)), rope_cache(500, 32)
    normed = rms_norm(q, weights[0], 1e-2), rms_norm(k, weights[1], 1e-2)
    expected = apply_rope_reference(*normed, Rope(positions, cache))
    rope = Rope(positions, cache, (*weights, 1e-2))
    for actual, wanted in zip(apply_rope_reference(q, k, rope), expected, strict=True):
        assert_close(actual, wanted)


def empty_caches(v: torch.Tensor, block_size: int) -> list[torch.Tensor]:
    """Keys and values of 6 blocks, NaN everywhere."""
    return [torch.full((6, block_size, *v.shape[1:]), torch.nan, dtype=v.dtype, device=v.device) for _ in "kv"]


def test_rope_and_store_writes_its_slots_and_no_other() -> None:
    q, kv = torch.randn(9, 2, 20), torch.randn(9, 7, 20)
    k, v = kv[:, 1:4], kv[:, 4:]
    rope = Rope(torch.randint(0, 50, (9,)), rope_cache(50, 20))
    slots = torch.randperm(24)[:9]
    slots[3] = slots[8] = -1
    expected_q, expected_k = apply_rope_reference(q, k, rope)
    caches = empty_caches(v, block_size=4)
    assert torch.equal(rope_and_store(q, k, v, rope, *caches, slots), expected_q)
    for new, cache in zip((expected_k, v), caches, strict=True):
        for slot in range(24):
            row = cache[slot // 4, slot % 4]
            if slot in slots:
                assert torch.equal(row, new[slots.tolist().index(slot)])
            else:
                assert row.isnan().all()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "block_size"), [(9, 3, 64, 16), (4, 4, 24, 4), (1, 1, 128, 8)]
)
def test_rope_and_store_triton_on_views(
    device: torch.device,
    dtype: torch.dtype,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    normed: bool,
) -> None:
    qkv = torch.randn(11, q_heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    q, k, v = qkv.split((q_heads, kv_heads, kv_heads), dim=1)
    untouched = v.clone()
    weights = torch.rand(2, head_dim, dtype=dtype, device=device) + 0.5
    slots = torch.randperm(6 * block_size)[:11].to(device)
    slots[torch.randint(11, (3,))] = -1
    rope = Rope(
        torch.randint(0, 300, (11,), device=device),
        rope_cache(300, head_dim).to(device),
        (*weights, 1e-5) if normed else None,
    )
    cpu_rope = Rope(rope.positions.cpu(), rope.cos_sin_cache.cpu(), (*weights.cpu(), 1e-5) if normed else None)
    expected_caches, caches = (empty_caches(x, block_size) for x in (v.cpu(), v))
    expected = rope_and_store(q.cpu(), k.cpu(), v.cpu(), cpu_rope, *expected_caches, slots.cpu())
    assert_close(_rope_and_store_triton(q, k, v, rope, *caches, slots), expected.to(device))
    for cache, wanted in zip(caches, expected_caches, strict=True):
        assert torch.equal(cache.isnan(), wanted.isnan().to(device))
        assert_close(cache.nan_to_num(), wanted.nan_to_num().to(device))
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


@pytest.mark.parametrize("rows", [0, 1, 8, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_with_a_packed_weight(rows: int, has_bias: bool) -> None:
    x, weight = torch.randn(rows, 96), torch.randn(50, 96)
    bias = torch.randn(50) if has_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_close(packed_linear(x, pack_weight(weight), bias), expected)
    assert_close(linear(x, weight, bias), expected)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(50, 96), (7, 1024), (130, 2048), (9, 2500)])
def test_linear_triton_of_one_token(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], has_bias: bool
) -> None:
    x, weight = (torch.randn(*size, dtype=dtype, device=device) for size in ((1, shape[1]), shape))
    bias = torch.randn(shape[0], dtype=dtype, device=device) if has_bias else None
    with poisoned():
        out = _token_linear_triton(x / shape[1] ** 0.5, weight, bias)
        given = torch.empty_like(out)
        assert _token_linear_triton(x / shape[1] ** 0.5, weight, bias, given) is given
    assert torch.equal(given, out)
    expected = linear_reference(
        (x / shape[1] ** 0.5).double(), weight.double(), None if bias is None else bias.double()
    )
    assert_close(out, expected)
