"""The layers of a tensor-parallel decoder; each knows which slices of a checkpoint it is made of."""

from rayllm.models.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from rayllm.models.layers.linear import ColumnParallelLinear, RowParallelLinear
from rayllm.models.layers.norm import RMSNorm
from rayllm.models.layers.rotary import rope_table
from rayllm.models.layers.slices import Split, WeightSlice

__all__ = [
    "ColumnParallelLinear",
    "RMSNorm",
    "RowParallelLinear",
    "Split",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "WeightSlice",
    "rope_table",
]
