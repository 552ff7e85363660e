"""What the kernels' tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN, or for integers the largest: what a kernel does not write, the test sees."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Compares in float64, by default with the tolerance of `actual`'s dtype, relative and absolute."""
    tolerance = _TOLERANCE[actual.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)
