"""rayllm: large language models served from many GPUs, on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rayllm.errors import EngineDeadError, UsageError
from rayllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from rayllm.frontend.async_llm import AsyncLLM
    from rayllm.frontend.llm import LLM

__version__ = "0.1.0"

__all__ = ["LLM", "AsyncLLM", "EngineDeadError", "SamplingParams", "UsageError"]


def __getattr__(name: str) -> Any:
    """LLM and AsyncLLM bring Ray along, so they are imported when first used."""
    if name == "LLM":
        from rayllm.frontend.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from rayllm.frontend.async_llm import AsyncLLM

        return AsyncLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
