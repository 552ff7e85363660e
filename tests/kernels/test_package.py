"""The package stands alone: without Triton, and without the engine."""

from __future__ import annotations

import subprocess
import sys


def test_runs_on_a_cpu_without_triton_and_without_the_engine() -> None:
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, rayllm_kernels
assert rayllm_kernels.silu_and_mul(torch.ones(1, 4)).shape == (1, 2)
assert not [name for name in sys.modules if name.split(".")[0] in ("rayllm", "ray")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
