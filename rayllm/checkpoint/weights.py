"""Fills a model's parameters from a checkpoint; each shard reads only its own slices from the disk."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from rayllm.checkpoint.gguf_tensors import GGUFCheckpoint
from rayllm.checkpoint.safetensors import SafetensorsCheckpoint
from rayllm.checkpoint.sources import ModelSource
from rayllm.errors import UsageError
from rayllm.models.decoder import Decoder
from rayllm.models.layers import WeightSlice
from rayllm.models.parallel import TensorParallel
from rayllm.progress import Track, untracked

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


class Checkpoint(Protocol):
    """Tensors by their Hugging Face names."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None when there is no such tensor."""

    def read(self, part: WeightSlice) -> int:
        """Fills `part.target`; returns the bytes read."""


def fill_dummy(model: torch.nn.Module, rank: int) -> None:
    """Random weights, normal with σ = 0.02, norms 1: the same for the same name, rank and shape."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1)
        else:
            seed = zlib.crc32(f"{rank} {name.replace('.format.', '.')}".encode())  # whatever format holds it
            generator = torch.Generator(parameter.device).manual_seed(seed)
            parameter.normal_(0, 0.02, generator=generator)
