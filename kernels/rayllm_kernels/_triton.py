"""Triton; where it is not installed, just enough for the CPU to import the modules of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    jit = triton.jit
except ImportError:
    triton = tl = gdc_launch_dependents = gdc_wait = None

    def jit(kernel: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Leaves a kernel that nothing will launch as it is."""
        return kernel or (lambda kernel: kernel)


@cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a kernel that begins with `if DEPENDENT: gdc_wait()`, and then lets the next one start.

    From Hopper on it is launched while the kernel before it still runs (programmatic dependent launch), and waits for
    that one's results by itself: a microsecond less between two small kernels.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}


__all__ = ["dependent_launch", "gdc_launch_dependents", "gdc_wait", "jit", "tl", "triton"]
