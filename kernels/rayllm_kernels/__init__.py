"""The operations of the engine's models. Each chooses by its tensors' device: Triton on CUDA (for prefill
FlashAttention-4, where it is installed), plain torch elsewhere. `<op>_reference` beside each specifies it.

They know tensors, and nothing of models, steps or the rest of rayllm."""

from rayllm_kernels._triton import compiling
from rayllm_kernels.activation import silu_and_mul
from rayllm_kernels.decode_attention import DecodeItems, decode_attention, divide_decodes
from rayllm_kernels.filtering import filter_logits
from rayllm_kernels.linear import linear, pack_weight, packed_linear
from rayllm_kernels.norm import rms_norm
from rayllm_kernels.paged_kv import PagedKV
from rayllm_kernels.prefill_attention import prefill_attention, prefill_backend
from rayllm_kernels.pruning import compact_kv, select_kept, window_scores
from rayllm_kernels.rope import Rope, rope_and_store
from rayllm_kernels.sampling import gumbel_noise, sample_gumbel

__all__ = [
    "DecodeItems",
    "PagedKV",
    "Rope",
    "compact_kv",
    "compiling",
    "decode_attention",
    "divide_decodes",
    "filter_logits",
    "gumbel_noise",
    "linear",
    "pack_weight",
    "packed_linear",
    "prefill_attention",
    "prefill_backend",
    "rms_norm",
    "rope_and_store",
    "sample_gumbel",
    "select_kept",
    "silu_and_mul",
    "window_scores",
]
