"""A shard's model with its weights, before there is a cache."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from rayllm_kernels import prefill_backend

from rayllm.checkpoint.sources import ModelSource
from rayllm.checkpoint.weights import load_weights
from rayllm.config import EngineConfig
from rayllm.model_config import ModelConfig
from rayllm.models.decoder import Decoder, build_model
from rayllm.models.parallel import TensorParallel
from rayllm.progress import Track, untracked
from rayllm.runner.device import DTYPES, Device


@dataclass(frozen=True)
class LoadedModel:
    """One rank's part of a model, ready to compute."""

    decoder: Decoder
    config: EngineConfig
    model_config: ModelConfig
    tp: TensorParallel
    device: Device
    bytes_read: int
    """How much of the checkpoint this rank has read."""

    def prefill_backend(self) -> str:
        """What prefill attention runs on, and why if that is not the fastest there is."""
        return prefill_backend(DTYPES[self.config.dtype], self.model_config.head_dim)


def load_model(
    config: EngineConfig, source: ModelSource, tp: TensorParallel, device: Device, track: Track = untracked
) -> LoadedModel:
    """Makes the model and fills its weights. Raises `UsageError` for a checkpoint that does not fit the model."""
    decoder = build_model(source.config, tp, device.torch_device, DTYPES[config.dtype], config.max_model_len)
    # what attention runs on takes seconds to import, as the weights do to be read
    threading.Thread(target=_import_attention, args=(config, source.config, device), daemon=True).start()
    bytes_read = load_weights(decoder, source, tp, track)
    decoder.pack()
    return LoadedModel(decoder, config, source.config, tp, device, bytes_read)


def _import_attention(config: EngineConfig, model: ModelConfig, device: Device) -> None:
    if device.is_cuda:
        torch.cuda.set_device(device.torch_device)  # a thread has its own current device
    prefill_backend(DTYPES[config.dtype], model.head_dim)
