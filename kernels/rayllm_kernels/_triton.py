"""Triton; where it is not installed, just enough for the CPU to import the modules of the kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch

_launched: ContextVar[list[Any] | None] = ContextVar("_launched", default=None)
"""The kernels launched under `compiling`."""

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    class _Kernel(triton.JITFunction):
        """Launched under `compiling`, it does not run."""

        def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            launched = _launched.get()
            kernel = super().run(*args, grid=grid, warmup=warmup or launched is not None, **options)
            if launched is not None:
                launched.append(kernel)
            return kernel

except ImportError:
    triton = tl = gdc_launch_dependents = gdc_wait = None


def jit(kernel: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`; without Triton it leaves a kernel, which nothing will launch, as it is."""
    if kernel is None:
        return partial(jit, **options)
    if triton is None:
        return kernel
    if triton.knobs.runtime.interpret:
        return triton.jit(kernel, **options)
    return _Kernel(kernel, **options)


@contextmanager
def compiling() -> Iterator[None]:
    """Kernels launched in this block do not run; they are compiled, many at once, and loaded when it ends."""
    launched: list[Any] = []
    token, device = _launched.set(launched), torch.cuda.current_device()
    try:
        with ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,)) as executor:
            with triton.AsyncCompileMode(executor):
                yield
            # loading builds a launcher, for which Triton runs a C compiler until 3.6
            list(executor.map(_load, dict.fromkeys(launched)))
    finally:
        _launched.reset(token)


def _load(kernel: Any) -> None:
    """`kernel`: compiled, or a promise that is kept by now."""
    _ = kernel.result().run if hasattr(kernel, "result") else kernel.run


@cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a kernel with `if DEPENDENT: gdc_wait()`, which then lets the next one start. Before that it
    writes nothing, and reads nothing of the kernel launched just before it.

    From Hopper on it is launched while the kernel before it still runs (programmatic dependent launch), and waits for
    that one's results by itself: a microsecond less between two small kernels.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}


__all__ = ["compiling", "dependent_launch", "gdc_launch_dependents", "gdc_wait", "jit", "tl", "triton"]
