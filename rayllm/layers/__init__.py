"""The layers of a tensor-parallel decoder; each knows which slices of a checkpoint it is made of."""

from rayllm.layers.embedding import VocabParallelEmbedding
from rayllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from rayllm.layers.norm import RMSNorm
from rayllm.layers.rotary import rope_table
from rayllm.layers.slices import Split, WeightSlice

__all__ = [
    "ColumnParallelLinear",
    "RMSNorm",
    "RowParallelLinear",
    "Split",
    "VocabParallelEmbedding",
    "WeightSlice",
    "rope_table",
]
