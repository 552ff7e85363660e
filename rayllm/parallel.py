"""The tensor-parallel group: how ranks meet, and what the layers see of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from rayllm.device import Device


@dataclass(frozen=True)
class TensorParallel:
    """Rank `rank` of `size`; collectives over the default process group, none of them called when size is 1."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums `x` (any shape) over the ranks, in place."""
        if self.size > 1:
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


def join(rank: int, size: int, store: tuple[str, int] | None, device: Device) -> TensorParallel:
    """Joins the process group at `store` (host and port); a group of one needs none."""
    if store is not None:
        # rank 0 is a client of its own store
        client = dist.TCPStore(*store, size, is_master=False)
        device_id = device.torch_device if device.is_cuda else None
        dist.init_process_group(device.backend, store=client, rank=rank, world_size=size, device_id=device_id)
    return TensorParallel(rank, size)
