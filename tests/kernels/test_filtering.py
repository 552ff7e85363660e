"""top_k, top_p and min_p: the reference against plain Python, Triton against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from kernel_testing import poisoned
from rayllm_kernels import filter_logits
from rayllm_kernels.filtering import _filter_logits_triton

Limits = tuple[float, int, float, float]
"""temperature, top_k, top_p, min_p."""


def kept_by_definition(logits: Sequence[float], limits: Limits) -> set[int]:
    temperature, top_k, top_p, min_p = limits
    scaled = [x / (temperature or 1) for x in logits]
    largest = max(scaled)
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    order = [i for i in order if math.exp(scaled[i] - largest) >= min_p]
    if top_k:
        order = [i for i in order if scaled[i] >= scaled[order[:top_k][-1]]]
    masses = [math.exp(scaled[i] - largest) for i in order]
    last = order[0]
    for rank, i in enumerate(order):
        if top_p >= 1 or math.fsum(masses[:rank]) < top_p * math.fsum(masses):
            last = i
    return {i for i, x in enumerate(scaled) if x >= scaled[last]}


def tensors(rows: Sequence[Limits], device: torch.device) -> tuple[torch.Tensor, ...]:
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    floats = [torch.tensor(column, dtype=torch.float32, device=device) for column in (temperature, top_p, min_p)]
    return floats[0], torch.tensor(top_k, device=device), *floats[1:]


def random_limits(rows: int, vocab_size: int) -> list[Limits]:
    def choose(*options: float) -> float:
        return options[int(torch.randint(len(options), ()))]

    return [
        (
            choose(0, 0.6, 1.0, 1.7),
            int(choose(0, 1, 2, 7, vocab_size // 2, vocab_size, vocab_size + 5)),
            choose(1.0, 1e-6, 0.3, 0.85, 0.999),
            choose(0, 0, 0.01, 0.4),
        )
        for _ in range(rows)
    ]


def random_logits(rows: int, vocab_size: int) -> torch.Tensor:
    """Some distinct, some with many ties; some tokens are banned."""
    logits = torch.randn(rows, vocab_size) * torch.randint(1, 8, (rows, 1))
    logits[::2] = (logits[::2] * 2).round() / 2
    logits[torch.rand(rows, vocab_size) < 0.05] = -torch.inf
    logits[:, 3] = 1.0
    return logits


def test_reference_is_its_definition() -> None:
    logits, limits = random_logits(60, 50), random_limits(60, 50)
    filtered = filter_logits(logits, *tensors(limits, logits.device))
    for row, own, result in zip(logits.tolist(), limits, filtered.tolist(), strict=True):
        kept = {i for i, x in enumerate(result) if x > -math.inf}
        assert kept == {i for i in kept_by_definition(row, own) if row[i] > -math.inf}
        assert all(result[i] == row[i] for i in kept)


@pytest.mark.parametrize("vocab_size", [40, 1024, 3000])
def test_triton(device: torch.device, vocab_size: int) -> None:
    """Kept tokens differ from the reference's only where masses are within rounding of top_p."""
    rows = 12 if device.type == "cpu" else 200
    logits, limits = random_logits(rows, vocab_size).to(device), random_limits(rows, vocab_size)
    arguments = tensors(limits, device)
    with poisoned():
        filtered = _filter_logits_triton(logits, *arguments)
    tolerances = [[(t, k, p * factor if p < 1 else p, m) for t, k, p, m in limits] for factor in (1 - 1e-5, 1 + 1e-5)]
    fewest, most = (filter_logits(logits, *tensors(own, device)) > -torch.inf for own in tolerances)
    kept = filtered > -torch.inf
    assert (fewest <= kept).all()
    assert (kept <= most).all()
    assert torch.equal(filtered[kept], logits[kept])


def test_the_likeliest_are_always_kept(device: torch.device) -> None:
    """Where a share of the mass is too small for float32, or the mass is: two tokens tie for the most."""
    logits = torch.tensor([[1.0, 5, 5, 2]] * 2, device=device)
    filtered = _filter_logits_triton(logits, *tensors([(1.0, 0, 1e-50, 0.0), (1e-40, 0, 0.9, 0.0)], device))
    assert (filtered > -torch.inf).tolist() == [[False, True, True, False]] * 2


@pytest.mark.gpu
def test_whole_vocabulary_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    logits = torch.randn(64, 151_936, device="cuda") * 3
    limits: list[Limits] = [(0.6, 20, 0.95, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.05), (0.8, 1000, 1.0, 0.0)] * 16
    kept = filter_logits(logits, *tensors(limits, logits.device)) > -torch.inf
    expected = filter_logits(logits.cpu(), *tensors(limits, torch.device("cpu"))) > -torch.inf
    assert (kept.cpu() != expected).sum() <= 64
