"""CUDA graphs of decode steps: one for each of a few batch sizes; a batch is padded to the next."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import torch

from rayllm.lanes import Lanes
from rayllm.progress import Track, untracked


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then every 8 up to 64, every 16 up to 256, every 64 above; at most `max_num_seqs`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 1, 64)]
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


class DecodeGraphs:
    """Replays `forward(token_lanes [B], positions [B]) → logits [B, V]` for decode rows. All graphs share memory.

    With no sizes (on a CPU, or `enforce_eager`) it holds nothing and never serves.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        lanes: Lanes,
        sizes: list[int],
        track: Track = untracked,
    ):
        self._lanes = lanes
        self._sizes = sizes
        if not sizes:
            return
        device = lanes.device.torch_device
        self._inputs = torch.stack(
            (torch.full((sizes[-1],), lanes.padding, device=device), torch.zeros(sizes[-1], dtype=int, device=device))
        )
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        pool = None
        for size in track(sizes[::-1], "capturing CUDA graphs"):
            inputs = self._inputs[:, :size]
            forward(*inputs)  # compiles kernels, and lets libraries allocate outside the graph
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool):
                output = forward(*inputs)
            pool = pool or graph.pool()
            self._graphs[size] = graph, output

    def serves(self, num_rows: int) -> bool:
        return bool(self._sizes) and num_rows <= self._sizes[-1]

    def __call__(self, lanes: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Logits [B, V] of decode rows; valid until the next call."""
        num_rows = len(lanes)
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        padded = np.zeros((2, size), np.int64)
        padded[0] = self._lanes.padding
        padded[0, :num_rows], padded[1, :num_rows] = lanes, positions
        self._inputs[:, :size].copy_(self._lanes.device.put(padded))
        graph, output = self._graphs[size]
        graph.replay()
        return output[:num_rows]
