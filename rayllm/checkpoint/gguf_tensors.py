"""The tensors of a .gguf file, read in slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rayllm.checkpoint.gguf import GGUFTensor, read_index
from rayllm.model_config import ModelConfig
from rayllm.models.architectures import architecture_of
from rayllm.models.layers import WeightSlice

PIECE_VALUES = 1 << 20
"""Quantised tensors are expanded to float32 in pieces of about this many values."""


class GGUFCheckpoint:
    """A slice is read as quantised rows or blocks, and only it is dequantised. Tensors go by Hugging Face's names."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        import gguf

        record = architecture_of(config.model_type)
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(numbers[record.gguf_name], config.num_hidden_layers)
        self._tensors = read_index(path)
        parts = {tensor.part for tensor in self._tensors.values()}
        self._bytes = {
            part: np.memmap(path.with_name(part), dtype=np.uint8, mode="r").view(np.ndarray) for part in parts
        }
        self._head_dim = config.head_dim
        self._pairwise = (".q_proj", ".k_proj") if record.gguf_pairwise else ()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None when there is no such tensor."""
        tensor = self._tensor(name)
        return None if tensor is None else tensor.shape

    def read(self, part: WeightSlice) -> int:
        """Fills `part.target`, dequantised to its dtype; returns the bytes read."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        tensor = self._tensor(part.name)
        assert tensor is not None
        ggml_type = GGMLQuantizationType(tensor.ggml_type)
        block_values, block_bytes = GGML_QUANT_SIZES[ggml_type]
        # A vector is taken as a column: those are never quantised, so that any part of them can be read.
        target = part.target if part.target.dim() == 2 else part.target.unsqueeze(1)
        rows, columns = target.shape
        total = tensor.shape[1] if len(tensor.shape) == 2 else 1
        blocks = self._bytes[tensor.part][tensor.offset : tensor.offset + tensor.nbytes]
        blocks = blocks.reshape(-1, total // block_values * block_bytes)
        skip = 0
        if part.dim == 0:
            blocks = blocks[part.start : part.start + rows]
        else:  # whole blocks that cover the columns
            first, skip = divmod(part.start, block_values)
            last = -(-(part.start + columns) // block_values)
            blocks = blocks[:, first * block_bytes : last * block_bytes]
        pairwise = any(name in part.name for name in self._pairwise)
        step = max(1, PIECE_VALUES // (columns * self._head_dim)) * self._head_dim
        for row in range(0, rows, step):
            # One long row: the library works on 16 rows at a time, of which ours are short.
            piece = np.array(blocks[row : row + step]).reshape(1, -1)
            values = torch.from_numpy(dequantize(piece, ggml_type)).view(min(step, rows - row), -1)
            values = values[:, skip : skip + columns]
            if pairwise:
                values = values.view(-1, self._head_dim // 2, 2, columns).transpose(1, 2).reshape(-1, columns)
            target[row : row + step].copy_(values)
        return blocks.size

    def _tensor(self, name: str) -> GGUFTensor | None:
        return self._tensors.get(self._names.get_name(name, try_suffixes=(".weight", ".bias")))
