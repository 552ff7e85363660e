"""Gumbel-max sampling: the noise against plain Python, the distribution, and Triton against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_testing import assert_close, poisoned
from rayllm_kernels import gumbel_noise, sample_gumbel
from rayllm_kernels.sampling import _sample_gumbel_triton

MASK = 2**32 - 1


def random_seeds(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-(2**63), 2**63 - 1, (rows,)), torch.randint(0, 100_000, (rows,))


def lowbias32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def plain_noise(seed: int, index: int, token: int) -> float:
    keys = []
    for salt in (0x9E3779B9, 0x85EBCA6B):
        key = lowbias32(seed & MASK ^ salt)
        key = lowbias32(key ^ seed >> 32 & MASK)
        keys.append(lowbias32(key ^ index))
    bits = lowbias32(lowbias32(token ^ keys[0]) + keys[1] & MASK)
    return -math.log(-math.log(((bits >> 9) + 0.5) / 2**23))


def test_noise_is_its_definition() -> None:
    seeds, indices = random_seeds(20)
    ids = torch.randint(0, 300_000, (50,))
    expected = [
        [plain_noise(seed, index, token) for token in ids.tolist()]
        for seed, index in zip(seeds.tolist(), indices.tolist(), strict=True)
    ]
    assert_close(gumbel_noise(seeds, indices, ids), torch.tensor(expected), tolerance=1e-4)


def test_noise_has_the_moments_of_a_gumbel_distribution() -> None:
    seeds, indices = random_seeds(4)
    noise = gumbel_noise(seeds, indices, torch.arange(200_000)).double()
    mean, variance = 0.5772156649, math.pi**2 / 6
    assert ((noise.mean(1) - mean).abs() < 6 * math.sqrt(variance / 200_000)).all()
    assert ((noise.var(1) - variance).abs() < 6 * math.sqrt(4.4 * variance**2 / 200_000)).all()


def test_noise_of_neighbouring_seeds_and_indices_is_uncorrelated() -> None:
    seed = torch.randint(0, 2**62, ()) + torch.tensor([0, 1, 0, 1, 2**32])
    noise = gumbel_noise(seed, torch.tensor([0, 0, 1, 1, 0]), torch.arange(200_000)).double()
    correlation = torch.corrcoef(torch.cat((noise, noise[:1].roll(1))))
    assert (correlation - torch.eye(6)).abs().max() < 6 / math.sqrt(200_000)


def test_samples_follow_the_softmax() -> None:
    rows, temperature = 40_000, 0.7
    logits = torch.randn(6)
    seed = torch.randint(0, 2**62, ()).expand(rows)
    _, ids = sample_gumbel(
        logits.expand(rows, 6), torch.full((rows,), temperature), seed, torch.arange(rows), vocab_offset=3
    )
    expected = (logits / temperature).softmax(0)
    found = torch.bincount(ids, minlength=9)[3:] / rows
    assert ((found - expected).abs() < 6 * (expected * (1 - expected) / rows).sqrt()).all()


def test_greedy_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(3, 50)
    logits[0, [7, 30]] = logits[1, [49, 0]] = 2.5
    values, ids = sample_gumbel(logits, torch.zeros(3), *random_seeds(3), vocab_offset=100)
    assert ids.tolist() == [107, 100, 100]
    assert values.tolist() == [2.5, 2.5, 0.0]


def test_a_rows_sample_depends_on_nothing_else() -> None:
    logits, temperature, (seeds, indices) = torch.randn(5, 900), torch.rand(5) + 0.1, random_seeds(5)
    temperature[2] = 0
    values, ids = sample_gumbel(logits, temperature, seeds, indices)
    order = torch.randperm(5)[:4]
    alone = sample_gumbel(logits[order], temperature[order], seeds[order], indices[order])
    assert torch.equal(alone[0], values[order])
    assert torch.equal(alone[1], ids[order])


@pytest.mark.parametrize("ranks", [2, 3])
def test_slices_of_the_vocabulary_agree_with_the_whole(ranks: int) -> None:
    logits, temperature, (seeds, indices) = torch.randn(6, 900), torch.rand(6) * 2, random_seeds(6)
    temperature[1] = 0
    parts = [
        sample_gumbel(part, temperature, seeds, indices, rank * (900 // ranks))
        for rank, part in enumerate(logits.chunk(ranks, dim=1))
    ]
    values, winner = torch.stack([values for values, _ in parts]).max(0)
    whole = sample_gumbel(logits, temperature, seeds, indices)
    assert torch.equal(values, whole[0])
    assert torch.equal(torch.stack([ids for _, ids in parts])[winner, torch.arange(6)], whole[1])


@pytest.mark.parametrize("vocab_size", [1, 1000, 4096, 9001])
def test_sample_triton(device: torch.device, dtype: torch.dtype, vocab_size: int) -> None:
    offset = int(torch.randint(0, 50_000, ()))
    logits = torch.randn(6, vocab_size + 8, dtype=dtype)[:, :vocab_size]
    logits[3], logits[4] = -torch.inf, -torch.inf
    only = torch.randint(0, vocab_size, (2,))
    logits[3, only[0]] = logits[4, only[1]] = -3.0
    temperature = torch.tensor([0.0, 1.0, 0.3, 0.0, 1.7, 5.0])
    args = (logits, temperature, *random_seeds(6))
    expected_values, expected_ids = sample_gumbel(*args, offset)
    with poisoned():
        values, ids = _sample_gumbel_triton(*(x.to(device) for x in args), offset)
    assert_close(values.cpu(), expected_values, tolerance=1e-4)
    assert ids.dtype == torch.int64
    assert torch.equal(ids[3:5].cpu(), only + offset)
    # Where two ids are all but equal, rounding may prefer the other one.
    scores = sample_scores(*args, offset)
    for row, (found, wanted) in enumerate(zip(ids.tolist(), expected_ids.tolist(), strict=True)):
        assert found == wanted or abs(scores[row, found - offset] - scores[row, wanted - offset]) < 1e-4


def sample_scores(
    logits: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor, index: torch.Tensor, offset: int
) -> torch.Tensor:
    """What is compared to choose each row's id, in float64."""
    noise = gumbel_noise(seed, index, torch.arange(offset, offset + logits.shape[1])).double()
    return torch.where(
        (temperature > 0)[:, None], logits.double() / temperature.double()[:, None] + noise, logits.double()
    )


def test_greedy_ties_triton(device: torch.device) -> None:
    logits = torch.zeros(2, 10_000, device=device)
    logits[0, [9_000, 5_000, 5_001]] = 1.0
    seeds, indices = (x.to(device) for x in random_seeds(2))
    with poisoned():
        values, ids = _sample_gumbel_triton(logits, torch.zeros(2, device=device), seeds, indices, 11)
    assert ids.tolist() == [5_011, 11]
    assert values.tolist() == [1.0, 0.0]


def test_sample_gumbel_triton_of_nan_stays_in_the_vocabulary(device: torch.device) -> None:
    logits = torch.full((3, 5000), torch.nan, device=device)
    logits[2, 4100] = 1
    temperature = torch.tensor([0, 1.0, 0.5], device=device)
    seed = torch.arange(3, device=device)
    ids = _sample_gumbel_triton(logits, temperature, seed, seed)[1]
    assert ids[2] == 4100
    assert ((ids >= 0) & (ids < 5000)).all()
