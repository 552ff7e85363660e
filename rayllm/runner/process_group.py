"""How the ranks of a tensor-parallel group meet."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from rayllm.models.parallel import TensorParallel, world
from rayllm.runner.device import Device

logger = logging.getLogger("rayllm")


def open_store(host: str, size: int) -> dist.TCPStore:
    """Opens, on rank 0, the store where `size` ranks meet; it is on a free port of `host`."""
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
    _symmetric_memory.rendezvous(memory, world())
    return memory
