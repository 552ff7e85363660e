"""A shard's model with its weights, before there is a cache."""

from __future__ import annotations

import threading
from dataclasses import dataclass

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
    """One rank's part of a model with its weights, ready to compute."""

    model: Decoder
    config: EngineConfig
    model_config: ModelConfig
    tp: TensorParallel
    device: Device
    tokenizer_path: str | None
    """Where its tokenizer is, if it has one that is wanted."""
    bytes_read: int
    """How much of the checkpoint this rank has read."""


def load_model(
    config: EngineConfig, source: ModelSource, tp: TensorParallel, device: Device, track: Track = untracked
) -> LoadedModel:
    """Makes the model and fills its weights. Raises `UsageError` for a checkpoint that does not fit the model."""
    model = build_model(source.config, tp, device.torch_device, DTYPES[config.dtype], config.max_model_len)

    def import_attention() -> None:
        device.use()
        attention_backend(config, source.config)

    # what attention runs on takes seconds to import, as the weights do to be read
    threading.Thread(target=import_attention, daemon=True).start()
    bytes_read = load_weights(model, source, tp, track)
    model.pack()
    tokenizer_path = None if config.skip_tokenizer_init else config.tokenizer or source.tokenizer_path
    return LoadedModel(model, config, source.config, tp, device, tokenizer_path, bytes_read)


def attention_backend(config: EngineConfig, model_config: ModelConfig) -> str:
    """What prefill attention runs on, and why if that is not the fastest there is."""
    return prefill_backend(DTYPES[config.dtype], model_config.head_dim)
