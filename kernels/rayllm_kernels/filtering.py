"""What top_k, top_p and min_p leave of the vocabulary."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch

from rayllm_kernels._triton import jit, tl

_BLOCK = 4096  # vocabulary ids that a program looks at together


def filter_logits_reference(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """See `filter_logits`. Puts no more tokens in order than the largest top_k, unless top_p stands alone in a row."""
    vocab_size = logits.shape[1]
    scale = torch.where(temperature > 0, temperature, 1)[:, None]
    largest = logits.amax(1, keepdim=True)
    lowest = largest + scale * min_p.log()[:, None]
    has_top_k, has_top_p = (top_k > 0)[:, None], (top_p < 1)[:, None]
    most = int(torch.where(top_k > 0, top_k, torch.where(top_p < 1, vocab_size, 0)).max()) if len(logits) else 0
    if most := min(most, vocab_size):
        ranked = (logits.sort(descending=True) if most == vocab_size else logits.topk(most)).values
        kth = ranked.gather(1, top_k[:, None].clamp(1, most) - 1)
        lowest = torch.where(has_top_k, torch.maximum(lowest, kth), lowest)
    if has_top_p.any():

        def masses(values: torch.Tensor) -> torch.Tensor:
            return ((values - largest).double() / scale).exp().masked_fill(values < lowest, 0)

        own = masses(ranked)
        is_kept = (ranked >= lowest) & (own.cumsum(dim=1) - own < top_p[:, None] * masses(logits).sum(1, keepdim=True))
        last = ranked.gather(1, is_kept.sum(1, keepdim=True).clamp(min=1) - 1)
        lowest = torch.where(has_top_p, last, lowest)
    return logits.masked_fill(logits < lowest, -torch.inf)


@jit
def _code(x):
    """int32 that is ordered as the float32 `x`."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # no negative zero
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _search(
    logits,
    vocab_size,
    maximum,
    log2_scale,
    low,
    high,
    inside,
    target,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Narrows (low, high], of codes, to where the sum over all tokens above falls below `target`.

    The sum is of tokens, or of their masses relative to the largest. What is above the new `low`, which is returned, is
    the fewest tokens that reach the target, with all that are as likely as the last of them. `inside`: how many tokens
    are in (low, high], or more. Each pass over the row looks at the quarters.
    """
    above_high = 0
    while (inside > 1) & (high - low > 1):
        bound_1 = (low + (high - low) // 4).to(tl.int32)
        bound_2 = (low + (high - low) // 2).to(tl.int32)
        bound_3 = (high - tl.maximum((high - low) // 4, 1)).to(tl.int32)  # high is above what a target of 0 reaches
        count_1 = tl.zeros((BLOCK,), tl.int32)
        count_2 = tl.zeros((BLOCK,), tl.int32)
        count_3 = tl.zeros((BLOCK,), tl.int32)
        mass_1 = tl.zeros((BLOCK,), tl.float32)
        mass_2 = tl.zeros((BLOCK,), tl.float32)
        mass_3 = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logit = tl.load(logits + column, mask=column < vocab_size, other=float("-inf"))
            code = tl.where(column < vocab_size, _code(logit), -(2**31))
            count_1 += (code > bound_1).to(tl.int32)
            count_2 += (code > bound_2).to(tl.int32)
            count_3 += (code > bound_3).to(tl.int32)
            if BY_MASS:
                mass = tl.exp2((logit - maximum) * log2_scale)
                mass_1 += tl.where(code > bound_1, mass, 0.0)
                mass_2 += tl.where(code > bound_2, mass, 0.0)
                mass_3 += tl.where(code > bound_3, mass, 0.0)
        above_low = above_high + inside
        above_1, above_2, above_3 = tl.sum(count_1, axis=0), tl.sum(count_2, axis=0), tl.sum(count_3, axis=0)
        if BY_MASS:
            sum_1, sum_2, sum_3 = tl.sum(mass_1, axis=0), tl.sum(mass_2, axis=0), tl.sum(mass_3, axis=0)
        else:
            sum_1, sum_2, sum_3 = above_1, above_2, above_3
        if sum_1 < target:
            high, above_high = bound_1.to(tl.int64), above_1
        elif sum_2 < target:
            low, above_low = bound_1.to(tl.int64), above_1
            high, above_high = bound_2.to(tl.int64), above_2
        elif sum_3 < target:
            low, above_low = bound_2.to(tl.int64), above_2
            high, above_high = bound_3.to(tl.int64), above_3
        else:
            low, above_low = bound_3.to(tl.int64), above_3
        inside = above_low - above_high
    return low


@jit
def _filter_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    out,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab_size
    out += row.to(tl.int64) * vocab_size
    scale = tl.load(temperature + row)
    scale = tl.where(scale > 0, scale, 1.0)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    log2_scale = 1.4426950408889634 / scale

    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(logits + column, mask=column < vocab_size, other=float("-inf")))
    maximum = tl.max(largest, axis=0)
    high = _code(maximum).to(tl.int64)
    low = _code(maximum + scale * tl.log(tl.load(min_p + row))).to(tl.int64) - 1
    if (k > 0) & (k < vocab_size):
        low = _search(logits, vocab_size, maximum, log2_scale, low, high, vocab_size, k, False, BLOCK)
    if p < 1:
        masses = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logit = tl.load(logits + column, mask=column < vocab_size, other=float("-inf"))
            masses += tl.where(_code(logit) > low, tl.exp2((logit - maximum) * log2_scale), 0.0)
        target = p * tl.sum(masses, axis=0)
        low = _search(logits, vocab_size, maximum, log2_scale, low, high, vocab_size, target, True, BLOCK)
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + column, mask=column < vocab_size, other=float("-inf"))
        tl.store(out + column, tl.where(_code(logit) > low, logit, float("-inf")), mask=column < vocab_size)


def _filter_logits_triton(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    if len(logits):
        _filter_kernel[(len(logits),)](
            logits, temperature, top_k, top_p, min_p, out, logits.shape[1],
            BLOCK=_BLOCK, num_warps=16,
        )  # fmt: skip
    return out


def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """`logits` [S, V] float32 with −inf for what min_p, top_k and top_p (Holtzman et al. 2020) leave out, in turn.

    temperature, top_p, min_p: [S] float32; top_k: [S] int64; all contiguous. Probabilities are those of
    logits / temperature (of logits where it is 0). min_p keeps tokens that are at least so likely, relative to the
    likeliest. top_k keeps the k likeliest, 0 all; top_p the fewest that have so much of the mass of what is left, 1
    all. Each keeps also what is as likely as the last of them.

    On CUDA nothing is sorted: passes over the row narrow down the least likely token that is kept.
    """
    op = _filter_logits_triton if logits.is_cuda else filter_logits_reference
    return op(logits, temperature, top_k, top_p, min_p)
