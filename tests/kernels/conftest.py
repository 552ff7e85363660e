"""Runs the Triton kernels in Triton's interpreter on the CPU; where there is a GPU, compiled."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton and the kernels read it when they are imported

from rayllm_kernels import activation


@pytest.fixture(autouse=True)
def _fresh_inputs() -> None:
    """Seeds torch anew for every test; pytest shows the seed when the test fails."""
    print(f"torch.manual_seed({torch.seed()})")


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
        pytest.fail("Triton was imported before TRITON_INTERPRET=1 was set: set it earlier, or outside pytest")
    return torch.device("cpu")


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    """The types of the models; the interpreter cannot compute in bfloat16."""
    if device.type == "cpu" and request.param == "bfloat16":
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    return getattr(torch, request.param)
