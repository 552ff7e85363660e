"""CUDA graphs of whole steps, from the packed input to the sampled tokens.

Python takes far longer to launch a model's kernels one by one than a GPU takes to run them, so steps are padded to
one of a few shapes, each captured once. All graphs share their memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from rayllm.progress import Track, untracked
from rayllm.runner.lanes import Lanes
from rayllm.runner.model_input import Shape, pack_padding, unpack


@dataclass(frozen=True)
class ModelOutput:
    """What a step computes; a graph's is valid until the next step. Tokens are written into their lanes already."""

    hidden: torch.Tensor
    """[T, hidden_size]."""
    logits: torch.Tensor
    """[S, local vocabulary]."""
    token_ids: torch.Tensor
    """[S] int64, sampled with temperature and seed alone."""

    def cut(self, shape: Shape) -> ModelOutput:
        """Views of these tensors that hold a step of a smaller shape."""
        n = shape.num_samples
        return ModelOutput(self.hidden[: shape.num_tokens], self.logits[:n], self.token_ids[:n])


def graph_shapes(max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, max_prunes: int) -> list[Shape]:
    """Shapes of steps that only decode, and of steps with chunks, whose number and tokens are padded separately."""
    decodes = _up_to(max_num_seqs, [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, *range(96, max_num_seqs, 32)])
    shapes = [Shape.of_decodes(n, max_model_len) for n in decodes]
    tokens = _up_to(max_num_batched_tokens, [128, 256, 512, *(2**k * half for k in range(9, 30) for half in (2, 3))])
    for num_tokens in tokens:
        n = min(max_num_seqs, num_tokens)
        shapes += [
            Shape(
                num_tokens=num_tokens,
                num_decodes=n,
                num_chunks=num_chunks,
                num_samples=n,
                max_seqlen_q=num_tokens,
                max_kv_len=max_model_len,
                num_prunes=max_prunes,
            )
            for num_chunks in _up_to(n, [16])
        ]
    return shapes


def _up_to(limit: int, sizes: list[int]) -> list[int]:
    return [size for size in sizes if size < limit] + [limit]


class StepGraphs:
    """The captured steps. With no shapes (on a CPU, or `enforce_eager`) it serves none."""

    def __init__(
        self,
        forward: Callable[..., ModelOutput],
        lanes: Lanes,
        shapes: list[Shape],
        track: Track = untracked,
    ):
        self._graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, ModelOutput]] = {}
        """The smallest shapes first."""
        if not shapes:
            return
        self._device = device = lanes.device
        largest_first = sorted(shapes, key=lambda shape: (-shape.num_tokens, -shape.num_chunks))
        num_groups = len(lanes.block_tables)
        size = max(shape.packed_size(num_groups) for shape in shapes)
        self._packed = torch.empty(size, dtype=torch.int64, device=device.torch_device)
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # which may still be filling lanes and KV cache
        for shape in track(largest_first, "capturing CUDA graphs"):
            with torch.cuda.stream(stream):
                inputs = self._packed[: shape.packed_size(num_groups)]
                device.put(pack_padding(shape, lanes.padding, num_groups), out=inputs)
                # what is new compiles, or allocates, outside of the graph
                output = forward(unpack(inputs, shape, lanes))
                if not self._graphs:  # the largest shape comes first: the others' results fit into its tensors
                    shared = output
                views = shared.cut(shape)
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool)
                output = forward(unpack(inputs, shape, lanes), logits_out=views.logits)
                views.hidden.copy_(output.hidden)
                views.token_ids.copy_(output.token_ids)
                graph.capture_end()
            self._graphs[shape] = graph, views
        self._graphs = dict(reversed(self._graphs.items()))

    def find(self, own: Shape) -> Shape | None:
        """The smallest captured shape that a step of these sizes can be padded to."""
        for shape in self._graphs:
            if (
                (own.num_chunks > 0) == (shape.num_chunks > 0)
                and own.num_tokens <= shape.num_tokens
                and own.num_chunks <= shape.num_chunks
            ):
                return shape
        return None

    def __call__(self, packed: np.ndarray, shape: Shape) -> ModelOutput:
        """The step that `pack` padded to `shape`, which `find` found."""
        self._device.put(packed, out=self._packed[: len(packed)])
        graph, output = self._graphs[shape]
        graph.replay()
        return output
