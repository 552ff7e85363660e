"""Text to token ids and, token by token, back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllm.checkpoint.gguf import converted
from rayllm.checkpoint.sources import ModelSource
from rayllm.config import EngineArgs
from rayllm.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that spell bytes in GPT-2's vocabulary: itself where printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


class Tokenizer:
    """The tokenizer of a Hugging Face model, with its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._hf = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._added_ids = frozenset(added)
        self._is_byte_level = "ByteLevel" in str(self.backend.decoder)
        # Ids of <0x00> … <0xFF>, which spell what the vocabulary of a SentencePiece model lacks.
        has_bytes = "ByteFallback" in str(self.backend.decoder)
        spelled = {self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)} if has_bytes else set()
        self.byte_ids = frozenset(spelled - {None})

    @classmethod
    def from_source(cls, path: str | Path) -> Tokenizer:
        """path: a folder with tokenizer.json, a .gguf file, or a Hub id. UsageError if there is none."""
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
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones included."""
        return len(self._hf)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence, as far as the tokenizer knows them."""
        eos = self._hf.eos_token_id
        return () if eos is None else (eos,)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's token ids; `add_special_tokens`: with those that begin (and end) a text, if the model has them."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these ids; ids that are no tokens are left out."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for: part of a character, perhaps. b"" for an id that is no token."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self.byte_ids:
            return bytes([int(token[3:5], 16)])
        if self._is_byte_level and token_id not in self._added_ids:
            return bytes(BYTE_LEVEL_ALPHABET[char] for char in token)
        return token.replace("\u2581", " ").encode()  # SentencePiece's blank

    def token_text(self, token_id: int) -> str:
        """What one token stands for as text, with U+FFFD for what is no whole character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def apply_chat_template(self, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
        """The prompt of a conversation; keyword arguments go to the template (`tools`, `enable_thinking`, …).

        Raises UsageError when there is no template or it refuses the messages.
        """
        from jinja2 import TemplateError

        if not (self._hf.chat_template or kwargs.get("chat_template")):
            raise UsageError(
                "this model has no chat template: use the completions API, or pass chat_template", "messages"
            )
        kwargs = {"add_generation_prompt": not kwargs.get("continue_final_message")} | kwargs
        try:
            text = self._hf.apply_chat_template(messages, tokenize=False, **kwargs)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"the chat template refuses these messages: {error}", "messages") from error
        return self.encode(text, add_special_tokens=False)  # the template writes them itself


def load_tokenizer(args: EngineArgs, source: ModelSource) -> Tokenizer:
    """The tokenizer that the arguments name, or else the model's own; raises `UsageError` if there is none."""
    if (path := args.tokenizer or source.tokenizer_path) is None:
        raise UsageError(
            f"{source.path} has no tokenizer: name one with tokenizer, or set skip_tokenizer_init", "tokenizer"
        )
    return Tokenizer.from_source(path)


class Detokenizer:
    """Turns ids into text as they come: what `add` and finally `flush` return, joined, is `tokenizer.decode`
    of all ids, however they were split.

    `add` returns every character that no later id can change. It decodes the ids since the last border that
    none can cross, after those before it, lest the decoder treat them as the beginning of a text. (The
    `DecodeStream` of tokenizers is much the same, but fails or differs where the bytes are not UTF-8.)
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []
        self._pending: list[int] = []
        self._num_sent = 0  # characters of decode(context + pending)

    def add(self, ids: Sequence[int]) -> str:
        """The text that is certain with these ids, beyond what was returned before; often empty."""
        self._pending.extend(ids)
        border = self._byte_run_start()
        settled = self._pending[:border]
        text = self._decode(self._context + settled)
        if text.endswith(REPLACEMENT):  # perhaps only the first bytes of a character
            new, self._num_sent = text[self._num_sent : -1], len(text) - 1
            return new
        new = text[self._num_sent :]
        self._pending = self._pending[border:]
        if context := self._decode(settled):
            self._context, self._num_sent = settled, len(context)
        else:
            self._context, self._num_sent = self._context + settled, len(text)
        return new

    def flush(self) -> str:
        """The rest, at the end of all ids."""
        text = self._decode(self._context + self._pending)[self._num_sent :]
        self._context, self._pending, self._num_sent = [], [], 0
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens)

    def _byte_run_start(self) -> int:
        """Where the byte tokens begin in which the pending ids end: the next can still make all invalid."""
        start = end = len(self._pending)
        byte_ids = self._tokenizer.byte_ids
        if not byte_ids:
            return end
        while end > 0 and (self._pending[end - 1] in byte_ids or self._invisible(self._pending[end - 1])):
            end -= 1
            if self._pending[end] in byte_ids:
                start = end
        return start

    def _invisible(self, token_id: int) -> bool:
        skipped = self._skip_special_tokens and token_id in self._tokenizer.special_ids
        return skipped or self._tokenizer.backend.id_to_token(token_id) is None
