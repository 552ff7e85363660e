"""Finds a model's tokenizer and reads it; nothing of a checkpoint is run, nor asked about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from rayllm.checkpoint.files import check_file, read_json
from rayllm.checkpoint.gguf import converted
from rayllm.checkpoint.sources import SMALL_FILES, fetch, is_remote
from rayllm.errors import UsageError
from rayllm.models.config_fields import typed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
FILES = (TOKENIZER, "special_tokens_map.json", "added_tokens.json")
Token = str | dict[str, Any] | None
Side = Literal["left", "right"]


class _Config(msgspec.Struct):
    """The fields of tokenizer_config.json that transformers reads, or fails to read."""

    bos_token: Token = None
    eos_token: Token = None
    pad_token: Token = None
    unk_token: Token = None
    added_tokens_decoder: dict[str, dict[str, Any]] = {}
    additional_special_tokens: list[Token] | dict[str, Token] | None = None
    extra_special_tokens: list[Token] | dict[str, Token] | None = None
    chat_template: str | list[dict[str, str]] | None = None
    model_input_names: list[str] = []
    padding_side: Side = "right"
    truncation_side: Side = "right"


def read_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, a .gguf file, a Hub id or a URL. Raises UsageError if none can be read there."""
    folder = Path(fetch(str(source), SMALL_FILES) if is_remote(str(source)) else source).expanduser()
    if folder.suffix == ".gguf":
        folder = converted(folder)
    for template in folder.glob("*.jinja"):
        check_file(template)  # or what it points with would be the prompt
    if (folder / CONFIG).is_file():
        typed(read_json(folder / CONFIG), _Config, str(folder / CONFIG))
    if (folder / TOKENIZER).is_file():  # it says all, whatever class the checkpoint names
        from transformers import PreTrainedTokenizerFast as Loader
    else:  # older files, of which only their class knows the meaning; finding that imports torch
        from transformers import AutoTokenizer as Loader
    try:
        tokenizer = Loader.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise all kinds
        for name in FILES:
            if (folder / name).exists():
                read_json(folder / name)  # names the file if that is what is damaged
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"no tokenizer at {str(folder)!r} ({reason}): give a folder with {TOKENIZER}", "tokenizer"
        ) from error
    if not tokenizer.is_fast:
        raise UsageError(f"the tokenizer at {str(folder)!r} has no {TOKENIZER}, which rayllm needs", "tokenizer")
    return tokenizer
