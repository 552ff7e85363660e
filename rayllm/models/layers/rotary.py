"""The table of rotary position embeddings (arXiv:2104.09864) and its scalings for long contexts."""

from __future__ import annotations

import math

import torch

from rayllm.model_config import ModelConfig, RopeScaling


def rope_table(config: ModelConfig, max_model_len: int, rotary: bool = True) -> torch.Tensor:
    """[max_model_len, head_dim] float32 on the CPU: for each position head_dim/2 cosines, then the sines.

    Without `rotary` all angles are 0: what is rotated by them stays as it is.
    """
    if not rotary:
        ones = torch.ones(max_model_len, config.head_dim // 2, dtype=torch.float32, device="cpu")
        return torch.cat((ones, torch.zeros_like(ones)), dim=-1)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling, config)
    angles = torch.arange(max_model_len, dtype=torch.float32, device="cpu").outer(frequencies)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return table if scaling is None else table * scaling.attention_factor


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling, config: ModelConfig) -> torch.Tensor:
    if scaling.rope_type == "factors":
        return frequencies / torch.tensor(scaling.factors, dtype=torch.float32, device="cpu")
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling)
    if scaling.rope_type == "yarn":
        return _yarn(frequencies, scaling, config)
    return frequencies / scaling.factor


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Wavelengths beyond the original context / low_freq_factor are stretched by `factor`, those within
    original context / high_freq_factor kept, the others in between (Llama 3.1's reference code)."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequencies / scaling.factor, frequencies, kept.clamp(0, 1))


def _yarn(frequencies: torch.Tensor, scaling: RopeScaling, config: ModelConfig) -> torch.Tensor:
    """YaRN's "NTK by parts" (arXiv:2309.00071, section 3.2)."""

    def dimension(rotations: float) -> float:
        """The dimension pair that turns `rotations` times within the original context."""
        context = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return config.head_dim * math.log(context) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    pairs = torch.arange(len(frequencies), dtype=torch.float32, device="cpu")
    stretched = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return torch.lerp(frequencies, frequencies / scaling.factor, stretched)
