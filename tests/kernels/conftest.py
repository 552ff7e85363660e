"""Runs the Triton kernels in Triton's interpreter on the CPU (tests/conftest.py turns it on), or compiled on a GPU."""

from __future__ import annotations

import random

import pytest
import torch
from rayllm_kernels import activation


@pytest.fixture(autouse=True)
def _fresh_inputs(rng: random.Random) -> None:
    torch.manual_seed(rng.getrandbits(63))


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the Triton kernels run: interpreted on the CPU, or compiled on a GPU."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        return torch.device("cuda")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled in this process")
    if "Interpreted" not in type(activation._silu_and_mul_kernel).__name__:
        pytest.fail("Triton was imported without TRITON_INTERPRET=1: set it before anything imports Triton")
    return torch.device("cpu")


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    """The types of the models; the interpreter cannot compute in bfloat16."""
    if device.type == "cpu" and request.param == "bfloat16":
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    return getattr(torch, request.param)
