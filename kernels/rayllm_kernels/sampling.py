"""Sampling one token per row by the Gumbel-max trick, with noise that depends on nothing but the request."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch

from rayllm_kernels._triton import jit, tl, triton

_CHUNK = 4096  # vocabulary ids that one program scores
_SALT_0 = 0x9E3779B9 - 2**32
_SALT_1 = 0x85EBCA6B - 2**32


def _lowbias32_(x: torch.Tensor) -> torch.Tensor:
    """Chris Wellons' hash (github.com/skeeto/hash-prospector), in place on int32, which wraps modulo 2³².

    A right shift of int32 copies the sign: the masks make it a logical one.
    """
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x


def _row_key(seed: torch.Tensor, index: torch.Tensor, salt: int) -> torch.Tensor:
    """32 bits (int32) for each (seed, index); `salt` tells independent ones apart."""
    key = _lowbias32_(seed.int() ^ salt)
    key = _lowbias32_(key ^ (seed >> 32).int())
    return _lowbias32_(key ^ index.int())


def gumbel_noise(seed: torch.Tensor, index: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise as a pure function of (seed, index of the output token, vocabulary id).

    seed, index: [S] int64. ids: [V] int64. Returns [S, V] float32, between −2.9 and 16.7.
    """
    bits = _lowbias32_(ids.int() ^ _row_key(seed, index, _SALT_0).unsqueeze(1))
    bits = _lowbias32_(bits.add_(_row_key(seed, index, _SALT_1).unsqueeze(1)))
    uniform = ((bits >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def sample_gumbel_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    index: torch.Tensor,
    vocab_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sample_gumbel`."""
    scores = logits.float()
    sampled = temperature > 0
    if sampled.any():
        vocabulary = torch.arange(vocab_offset, vocab_offset + logits.shape[1], device=logits.device)
        noise = gumbel_noise(seed, index, vocabulary).masked_fill_(~sampled.unsqueeze(1), 0)
        scores = torch.addcdiv(noise, scores, torch.where(sampled, temperature, 1).unsqueeze(1))
    values, ids = scores.max(dim=1)
    return values, ids + vocab_offset


@jit
def _lowbias32(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@jit
def _triton_row_key(seed, index, salt):
    key = _lowbias32(seed.to(tl.uint32) ^ salt)
    key = _lowbias32(key ^ (seed >> 32).to(tl.uint32))
    return _lowbias32(key ^ index.to(tl.uint32))


@jit
def _score_kernel(
    logits,
    temperature,
    seed,
    index,
    chunk_values,
    chunk_ids,
    logits_stride,
    vocab_size,
    vocab_offset,
    CHUNK: tl.constexpr,
):
    row, chunk = tl.program_id(0), tl.program_id(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    logits += row.to(tl.int64) * logits_stride
    score = tl.load(logits + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
    row_temperature = tl.load(temperature + row)
    if row_temperature > 0:
        row_seed, row_index = tl.load(seed + row), tl.load(index + row)
        bits = (column + vocab_offset).to(tl.uint32) ^ _triton_row_key(row_seed, row_index, 0x9E3779B9)
        bits = _lowbias32(_lowbias32(bits) + _triton_row_key(row_seed, row_index, 0x85EBCA6B))
        uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2⁻²³
        score = score / row_temperature - tl.log(-tl.log(uniform))
    score = tl.where(score == score, score, float("-inf"))  # NaN has no maximum: an id would be out of range
    value, offset = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    out = row * tl.num_programs(1) + chunk
    tl.store(chunk_values + out, value)
    tl.store(chunk_ids + out, chunk * CHUNK + offset + vocab_offset)


@jit
def _best_chunk_kernel(chunk_values, chunk_ids, values, ids, chunks, CHUNKS_PADDED: tl.constexpr):
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS_PADDED)
    score = tl.load(chunk_values + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    value, best = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(values + row, value)
    tl.store(ids + row, tl.load(chunk_ids + row * chunks + best).to(tl.int64))


def _sample_gumbel_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    index: torch.Tensor,
    vocab_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocab_size = logits.shape
    chunks = triton.cdiv(vocab_size, _CHUNK)
    device = logits.device
    chunk_values = torch.empty(rows, chunks, dtype=torch.float32, device=device)
    chunk_ids = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    values = torch.empty(rows, dtype=torch.float32, device=device)
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    if rows > 0:
        _score_kernel[(rows, chunks)](
            logits,
            temperature,
            seed,
            index,
            chunk_values,
            chunk_ids,
            logits.stride(0),
            vocab_size,
            vocab_offset,
            CHUNK=_CHUNK,
        )
        _best_chunk_kernel[(rows,)](
            chunk_values,
            chunk_ids,
            values,
            ids,
            chunks,
            CHUNKS_PADDED=triton.next_power_of_2(chunks),
            num_warps=1,
        )
    return values, ids


def sample_gumbel(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    index: torch.Tensor,
    vocab_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from softmax(logits / temperature): the argmax of logits / temperature + Gumbel noise, or of the
    plain logits where the temperature is 0. Ties go to the lower id.

    logits: [S, V], any float dtype, computed in float32; the vocabulary's slice from `vocab_offset` on:
    each tensor-parallel rank samples its own slice, and the ranks compare values. temperature: [S] float32.
    seed, index: [S] int64, the request's seed and the index of the output token. Returns (values [S] float32,
    ids [S] int64), ids in the whole vocabulary.
    """
    op = _sample_gumbel_triton if logits.is_cuda else sample_gumbel_reference
    return op(logits, temperature, seed, index, vocab_offset)
