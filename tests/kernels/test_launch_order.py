"""Dependent launches: what a kernel reads before it waits must come from a kernel before its predecessor."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rayllm_kernels import PagedKV
from torch.utils._python_dispatch import TorchDispatchMode

LAUNCHING = {"zeros", "zero_", "fill_", "copy_", "full"}
"""Torch's operations that launch a kernel, of those that the attention may use."""


class Launches(TorchDispatchMode):
    """Torch's operations and Triton's kernels, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def recording(self, name: str, kernel: Any) -> Any:
        launches = self

        class Kernel:
            def __getitem__(self, grid: Any) -> Callable[..., Any]:
                launches.names.append(name)
                return kernel[grid]

        return Kernel()


def test_a_kernel_lies_between_dividing_decodes_and_attending(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """`_decode_kernel` reads its items before it waits."""
    module = importlib.import_module("rayllm_kernels.decode_attention")  # its name in the package is the function's
    launches = Launches()
    for name in ("_divide_kernel", "_decode_kernel"):
        monkeypatch.setattr(module, name, launches.recording(name, getattr(module, name)))
    cache = torch.randn(4, 16, 2, 32, device=device)
    kv_lens = torch.tensor([20], dtype=torch.int32, device=device)
    kv = PagedKV(cache, cache, torch.arange(4, dtype=torch.int32, device=device)[None], kv_lens, 64)
    q = torch.randn(1, 4, 32, device=device)
    with launches:
        module._decode_attention_triton(q, kv, 0.1)
    between = launches.names[launches.names.index("_divide_kernel") + 1 : launches.names.index("_decode_kernel")]
    assert LAUNCHING & set(between), f"only {between} between the two"
