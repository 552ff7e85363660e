"""Finds a model's tokenizer and reads it; nothing of a checkpoint is run, nor asked about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rayllm.checkpoint.files import read_json
from rayllm.checkpoint.gguf import converted
from rayllm.checkpoint.sources import SMALL_FILES, fetch, is_remote
from rayllm.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER = "tokenizer.json"
FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")


def read_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, a .gguf file, a Hub id or a URL. Raises UsageError if none can be read there."""
    folder = Path(fetch(str(source), SMALL_FILES) if is_remote(str(source)) else source).expanduser()
    if folder.suffix == ".gguf":
        folder = converted(folder)
    if (folder / TOKENIZER).is_file():  # it says all, whatever class the checkpoint names
        from transformers import PreTrainedTokenizerFast as Loader
    else:  # older files, of which only their class knows the meaning; finding that imports torch
        from transformers import AutoTokenizer as Loader
    try:
        tokenizer = Loader.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise all kinds
        for file in (folder / name for name in FILES):
            if file.exists():
                read_json(file)  # names the file if that is what is damaged
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"no tokenizer at {str(folder)!r} ({reason}): give a folder with {TOKENIZER}", "tokenizer"
        ) from error
    if not tokenizer.is_fast:
        raise UsageError(f"the tokenizer at {str(folder)!r} has no {TOKENIZER}, which rayllm needs", "tokenizer")
    return tokenizer
