"""Loads the tokenizer of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rayllm.checkpoint.gguf import converted
from rayllm.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_hf_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """path: a folder with tokenizer.json, a .gguf file, or a Hub id. Raises `UsageError` if there is none."""
    if Path(path).suffix == ".gguf":
        path = converted(path)
        from transformers import PreTrainedTokenizerFast as Loader  # its class; to find that out imports torch
    else:
        from transformers import AutoTokenizer as Loader
    try:
        tokenizer = Loader.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"no tokenizer at {str(path)!r} ({reason}): give a folder with tokenizer.json", "tokenizer"
        ) from error
    if not tokenizer.is_fast:
        raise UsageError(f"the tokenizer at {str(path)!r} has no tokenizer.json, which rayllm needs", "tokenizer")
    return tokenizer
