"""Triton; where it is not installed, just enough for the CPU to import the modules of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton = tl = None

    def jit(kernel: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Leaves a kernel that nothing will launch as it is."""
        return kernel or (lambda kernel: kernel)


__all__ = ["jit", "tl", "triton"]
