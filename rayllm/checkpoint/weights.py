"""Fills a model's parameters from a checkpoint; each shard reads only its own slices from the disk."""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from rayllm.checkpoint.gguf import GGUFTensor, read_index
from rayllm.checkpoint.sources import ModelSource
from rayllm.errors import UsageError
from rayllm.model_config import ModelConfig
from rayllm.models import Decoder
from rayllm.models.layers import WeightSlice
from rayllm.progress import Track, untracked
from rayllm.runner.parallel import TensorParallel

# Quantised tensors are expanded to float32 in pieces of about this many values.
PIECE_VALUES = 1 << 20
NUM_READERS = 4


def load_weights(model: Decoder, source: ModelSource, tp: TensorParallel, track: Track = untracked) -> int:
    """Fills all parameters of this rank's `model`; returns the bytes read from the checkpoint.

    Raises UsageError, before anything is read, naming the tensor that is missing or has an unexpected shape.
    """
    if source.format == "dummy":
        fill_dummy(model, tp.rank)
        return 0
    checkpoint: Checkpoint
    if source.format == "gguf":
        checkpoint = GGUFCheckpoint(Path(source.path), source.config)
    else:
        checkpoint = SafetensorsCheckpoint(Path(source.path))
    slices = list(model.weight_slices())
    for part in slices:
        found = checkpoint.shape(part.name)
        if found is None:
            raise UsageError(f"{source.path} lacks the tensor {part.name} that its configuration asks for")
        if found != part.shape:
            raise UsageError(
                f"{source.path}: tensor {part.name} has shape {list(found)}, its configuration asks for "
                f"{list(part.shape)}"
            )
    readers = ThreadPoolExecutor(NUM_READERS)
    try:
        reads = [readers.submit(checkpoint.read, part) for part in slices]
        return sum(read.result() for read in track(reads, "loading weights"))
    finally:
        readers.shutdown(cancel_futures=True)


def fill_dummy(model: torch.nn.Module, rank: int) -> None:
    """Random weights, normal with σ = 0.02, norms 1: the same for the same name, rank and shape."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1)
        else:
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{rank} {name}".encode()))
            parameter.normal_(0, 0.02, generator=generator)


class Checkpoint(Protocol):
    """Tensors by their Hugging Face names."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None when there is no such tensor."""

    def read(self, part: WeightSlice) -> int:
        """Fills `part.target`; returns the bytes read."""


class SafetensorsCheckpoint:
    """A folder of .safetensors files, memory-mapped: a slice is copied straight to its target."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(file.name for file in folder.glob("*.safetensors"))
        self._files: dict[str, Any] = {}
        for name in names:
            file = _open_safetensors(folder / name)
            self._files |= dict.fromkeys(file.keys(), file)

    def shape(self, name: str) -> tuple[int, ...] | None:
        file = self._files.get(name)
        return None if file is None else tuple(file.get_slice(name).get_shape())

    def read(self, part: WeightSlice) -> int:
        tensor = self._files[part.name].get_slice(part.name)
        span = slice(part.start, part.start + part.target.shape[part.dim])
        values = tensor[span] if part.dim == 0 else tensor[:, span]
        part.target.copy_(values)
        return values.nbytes


def _open_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UsageError(f"{file} is missing: download the checkpoint again") from None
    except SafetensorError as error:
        raise UsageError(f"{file} is damaged ({error}): download the checkpoint again") from error


class GGUFCheckpoint:
    """A .gguf file; a slice is read as quantised rows or blocks, and only it is dequantised."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        import gguf

        architecture = gguf.MODEL_ARCH[config.model_type.upper()]
        self._names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        self._tensors = read_index(path)
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        self._head_dim = config.head_dim
        # ggml's Llama rotates neighbouring pairs: its files have the rows of q and k in that order.
        self._pairwise = (".q_proj", ".k_proj") if config.model_type == "llama" else ()

    def _tensor(self, name: str) -> GGUFTensor | None:
        return self._tensors.get(self._names.get_name(name, try_suffixes=(".weight", ".bias")))

    def shape(self, name: str) -> tuple[int, ...] | None:
        tensor = self._tensor(name)
        return None if tensor is None else tensor.shape

    def read(self, part: WeightSlice) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        tensor = self._tensor(part.name)
        assert tensor is not None
        ggml_type = GGMLQuantizationType(tensor.ggml_type)
        block_values, block_bytes = GGML_QUANT_SIZES[ggml_type]
        # A vector is taken as a column: those are never quantised, so that any part of them can be read.
        target = part.target if part.target.dim() == 2 else part.target.unsqueeze(1)
        rows, columns = target.shape
        total = tensor.shape[1] if len(tensor.shape) == 2 else 1
        blocks = self._bytes[tensor.offset : tensor.offset + tensor.nbytes]
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
