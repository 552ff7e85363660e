"""A shard's device: memory, copies and clocks, whatever its kind."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Device:
    """A shard's device, and what follows from its kind."""

    torch_device: torch.device
    backend: str
    """The process group's backend: nccl or gloo."""

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.torch_device.type == "cuda"

    def put(self, array: np.ndarray, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copies to the device, into `out` if that is given; does not wait for what runs there."""
        host = torch.from_numpy(array)
        if self.is_cuda:
            host = host.pin_memory()
        return host.to(self.torch_device, non_blocking=True) if out is None else out.copy_(host, non_blocking=True)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """On a CPU it takes memory only where it is written to, which `torch.zeros` would not."""
        if self.is_cuda:
            return torch.zeros(shape, dtype=dtype, device=self.torch_device)
        return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the GPU, whoever uses them."""
        return torch.cuda.mem_get_info(self.torch_device)

    def all_reach(self, indices: list[int]) -> bool:
        """Whether each of these GPUs of this node can read the others' memory."""
        return all(torch.cuda.can_device_access_peer(i, j) for i in indices for j in indices if i != j)

    def use(self) -> None:
        """Makes it the current device of this thread."""
        if self.is_cuda:
            torch.cuda.set_device(self.torch_device)

    @contextmanager
    def measuring(self) -> Iterator[Callable[[], int]]:
        """On a GPU: what it yields tells how many bytes more than before the block held at most, once it has ended."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        peak = 0
        yield lambda: peak - before
        peak = torch.cuda.max_memory_allocated()

    def peak_memory(self) -> int:
        """Most bytes that tensors of this process occupied at once; of the whole process on a CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.torch_device)
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


class HostCopies:
    """Copies of device tensors to the host that run while the caller goes on."""

    def __init__(self, device: Device):
        self._is_cuda = device.is_cuda
        self._event: torch.cuda.Event | None = None

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The copy, to be read after `wait`; on a CPU the tensor itself."""
        if not self._is_cuda:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def record(self) -> None:
        """Marks the point after which all copies are there."""
        if self._is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Blocks until the copies are there. May be called on another thread."""
        if self._event is not None:
            self._event.synchronize()


class Stopwatch:
    """The time that a device spends on what is launched between `start` and `stop`."""

    def __init__(self, device: Device):
        self._device = device
        self._lap: list[Any] = []

    def start(self) -> None:
        """Begins, on the device, when what was launched before has ended."""
        self._lap = [self._now()]

    def stop(self) -> None:
        """Ends, on the device, when what was launched before has ended."""
        self._lap.append(self._now())

    def seconds(self) -> float:
        """0 if it was never started; to be asked once the device has finished what was launched."""
        if not self._lap:
            return 0.0
        start, end = self._lap
        seconds: float = start.elapsed_time(end) / 1000 if self._device.is_cuda else end - start
        return seconds

    def _now(self) -> Any:
        if not self._device.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def open_device(kind: str, gpu_ids: list[str], num_processes: int) -> Device:
    """`kind` is cuda or cpu; `gpu_ids` are what Ray assigned; `num_processes` share this node's cores."""
    if kind == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_processes))
        return Device(torch.device("cpu"), "gloo")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = visible.split(",").index(gpu_ids[0]) if visible else int(gpu_ids[0])
    torch.cuda.set_device(index)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32
    return Device(torch.device("cuda", index), "nccl")
