"""The tensor-parallel group: how ranks meet, and what the layers see of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rayllm.runner.device import Device

logger = logging.getLogger("rayllm")

SHARED_FROM = 512 << 10
"""Bytes from which a sum in memory that the ranks share is faster than NCCL's (2 GPUs over NVLink, in CUDA graphs:
8.9 µs against 10.4 at 512 KiB, 14 against 28 at 2 MiB, 109 against 138 at 32 MiB)."""


@dataclass(frozen=True)
class TensorParallel:
    """Rank `rank` of `size`; collectives over the default process group, none of them called when size is 1."""

    rank: int = 0
    size: int = 1
    shared: torch.Tensor | None = None
    """Memory that the other ranks' devices can read and write, if there is such; flat, of the model's dtype."""

    def summand(self, x: torch.Tensor, width: int) -> torch.Tensor | None:
        """Where [len(x), width] of x's dtype, which `all_reduce` is then to sum, are best written; None: anywhere."""
        count = len(x) * width
        if self.shared is None or not SHARED_FROM <= count * x.dtype.itemsize <= self.shared.nbytes:
            return None
        return self.shared[:count].view(len(x), width)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums `x` (any shape) over the ranks, in place. A `summand` is valid until the next one is asked for."""
        if self.shared is not None and x.data_ptr() == self.shared.data_ptr():
            torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", _world().group_name)
        elif self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] on each rank → [..., size · n], in order of rank."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x` on every rank, in place."""
        if self.size > 1:
            dist.broadcast(x, src=0)
        return x


def open_store(host: str, size: int) -> dist.TCPStore:
    """On rank 0: where `size` ranks meet, on a free port of `host`."""
    return dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)


def join(
    rank: int,
    size: int,
    store: tuple[str, int] | None,
    device: Device,
    node_id: str,
    shared: tuple[int, torch.dtype],
) -> TensorParallel:
    """Joins the process group at `store` (host and port); a group of one needs none.

    `shared`: how many numbers of which dtype are summed at once, at most; on GPUs of one node (`node_id`) which reach
    each other, they are summed in memory that all share.
    """
    if store is None:
        return TensorParallel(rank, size)
    # rank 0 is a client of its own store
    client = dist.TCPStore(*store, size, is_master=False)
    device_id = device.torch_device if device.is_cuda else None
    dist.init_process_group(device.backend, store=client, rank=rank, world_size=size, device_id=device_id)
    if not device.is_cuda or shared[1] == torch.float16:  # which torch does not sum there
        return TensorParallel(rank, size)
    client.set(f"place {rank}", f"{node_id} {device.torch_device.index}")
    places = [client.get(f"place {other}").decode().split() for other in range(size)]
    indices = [int(index) for _, index in places]
    if {node for node, _ in places} != {node_id} or not device.all_reach(indices):
        logger.info("the GPUs do not reach each other's memory: NCCL sums everything")
        return TensorParallel(rank, size)
    return TensorParallel(rank, size, _share(shared, device))


def _share(size: tuple[int, torch.dtype], device: Device) -> torch.Tensor:
    from torch.distributed import _symmetric_memory

    memory = _symmetric_memory.empty(size[0], dtype=size[1], device=device.torch_device)
    _symmetric_memory.rendezvous(memory, _world())
    return memory


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD
