"""FlashAttention-4's kernel, compiled by a process of its own while Ray and an engine's processes start.

Its compilation is seconds of Python, which in a shard would hold up all that is compiled beside it. It is kept on disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.metadata
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rayllm.caches import flash_attention_cache, use_writable_caches
from rayllm.config import EngineConfig
from rayllm.errors import UsageError
from rayllm.model_config import ModelConfig

GPU_DRIVER = Path("/dev/nvidiactl")
PR_SET_PDEATHSIG = 1
"""Linux: this process ends with the one that started it."""
TIMEOUT_S = 60
IMPOSSIBLE = OSError, UsageError, importlib.metadata.PackageNotFoundError
"""No place to write to, no FlashAttention-4."""


def start(config: EngineConfig, model: ModelConfig) -> subprocess.Popen[bytes] | None:
    """Starts the process that compiles, for a `config` of a GPU; the caller ends it. None where that has been done, or
    cannot be."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # as Ray hides GPUs from actors that ask for none
    if config.dtype == "float32" or is_hidden or not GPU_DRIVER.exists():
        return None
    size = config.tensor_parallel_size
    heads = model.num_attention_heads // size, model.local_kv_heads(size)
    arguments = [config.dtype, *map(str, (*heads, model.head_dim, config.block_size))]
    with contextlib.suppress(*IMPOSSIBLE):
        if not _marker(arguments).exists():
            command, null = [sys.executable, "-m", "rayllm.runner.precompile", *arguments], subprocess.DEVNULL
            return subprocess.Popen(command, stdin=null, stdout=null, stderr=null)
    return None


def wait() -> None:
    """Waits until no such process is at work on this machine."""
    if GPU_DRIVER.exists():
        with contextlib.suppress(*IMPOSSIBLE), _lock(fcntl.LOCK_SH):
            pass


def _marker(arguments: list[str]) -> Path:
    """A file that is there when the kernel is, for this Python and these packages."""
    versions = [importlib.metadata.version(package) for package in ("flash-attn-4", "nvidia-cutlass-dsl")]
    return flash_attention_cache() / "-".join((f"rayllm-py{sys.version_info.minor}", *versions, *arguments))


@contextlib.contextmanager
def _lock(kind: int) -> Iterator[None]:
    with open(flash_attention_cache() / "rayllm.lock", "a") as file:
        fcntl.flock(file, kind)
        yield


def main() -> None:
    """What that process does; its arguments are the dtype, query and KV heads, head_dim and block_size."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.alarm(TIMEOUT_S)
    dtype_name, *sizes = sys.argv[1:]
    heads, kv_heads, head_dim, block_size = map(int, sizes)
    use_writable_caches()
    with _lock(fcntl.LOCK_EX):
        if (marker := _marker(sys.argv[1:])).exists():
            return
        import torch
        from rayllm_kernels import PagedKV, prefill_attention, prefill_backend

        dtype = getattr(torch, dtype_name)
        if prefill_backend(dtype, head_dim) == "flash_attn_4":
            q = torch.zeros(block_size, heads, head_dim, dtype=dtype, device="cuda")
            cache = torch.zeros(2, block_size, kv_heads, head_dim, dtype=dtype, device="cuda")
            table = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
            ends = torch.tensor([0, block_size], dtype=torch.int32, device="cuda")
            kv = PagedKV(cache, cache, table, ends[1:], max_kv_len=block_size)
            prefill_attention(q, kv, ends, block_size, scale=1.0)
            marker.touch()


if __name__ == "__main__":
    main()
