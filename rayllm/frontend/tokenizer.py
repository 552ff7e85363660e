"""Text to token ids and, token by token, back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllm.checkpoint.sources import ModelSource
from rayllm.checkpoint.tokenizer import read_tokenizer
from rayllm.config import EngineArgs
from rayllm.errors import UsageError
from rayllm.frontend.chat import Messages, read_chat_template, render_chat
from rayllm.frontend.detokenizer import (
    BLANK,
    ByteLevelDetokenizer,
    Detokenizer,
    PieceDetokenizer,
    WindowDetokenizer,
    spelling_of,
    steps_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that spell bytes in GPT-2's vocabulary: itself where printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


def _shrinkage(normalizer: Any) -> int:
    """How many bytes of a text a normalizer makes one of, at most; 0 where that is not known."""
    factors = {"NFC": 3, "Prepend": 1}  # 9 bytes of Hangul's parts are 3 when composed
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    return math.prod(1 if step == blank else factors.get(step["type"], 0) for step in steps_of(normalizer))


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
        self._spelling = spelling_of(self.backend.decoder)
        # ids of <0x00> … <0xFF>, which spell what the vocabulary of a SentencePiece model lacks
        has_bytes = "ByteFallback" in str(self.backend.decoder)
        spelled = {self.backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)} if has_bytes else {}
        self._bytes_by_id = {token_id: byte for token_id, byte in spelled.items() if token_id is not None}
        self._token_bytes: dict[int, bytes] = {}

    @cached_property
    def transformers(self) -> PreTrainedTokenizerFast:
        """A copy of the tokenizer that this one wraps: truncation, say, that is set there does not reach this one."""
        return copy.deepcopy(self._hf)

    @classmethod
    def from_source(cls, path: str | Path) -> Tokenizer:
        """path: a folder with tokenizer.json, a .gguf file, a Hub id or a URL. UsageError if there is none."""
        return cls(read_tokenizer(path))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones included."""
        return len(self._hf)

    @property
    def special_tokens(self) -> dict[str, str | None]:
        """The tokens that begin, end and pad a text, and that stand for unknown ones; None for what there is not."""
        return {name: getattr(self._hf, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The Jinja template of conversations, or several by name; None if there is none."""
        return self._hf.chat_template

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence, as far as the tokenizer knows them."""
        eos = self._hf.eos_token_id
        return () if eos is None else (eos,)

    def can_be_masked(self, vocab_size: int) -> bool:
        """Whether grammars know what its tokens spell, all of them within a model's vocabulary."""
        return self._spelling != "other" and self._num_ids <= vocab_size

    @cached_property
    def _num_ids(self) -> int:
        return max(self.backend.get_vocab().values()) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's token ids; `add_special_tokens`: with those that begin (and end) a text, if the model has them.

        Raises `UsageError` for a text that is not Unicode.
        """
        return self._encoding(text, add_special_tokens).ids

    def added(self, text: str) -> list[bool]:
        """For each of the text's token ids, whether `encode` added it to what the text holds."""
        return [bool(bit) for bit in self._encoding(text, True).special_tokens_mask]

    def _encoding(self, text: str, add_special_tokens: bool) -> Any:
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            raise UsageError("a text must be Unicode: this one holds half of a surrogate pair", "prompt") from None

    def least_tokens(self, text: str) -> int:
        """A number of tokens that `encode` surpasses, told by the text's size alone; 0 where that tells nothing."""
        longest, missing = self._longest_token
        return len(text.encode(errors="replace").translate(None, missing)) // longest if longest else 0

    @cached_property
    def _longest_token(self) -> tuple[int, bytes]:
        """The most bytes of a text that one token takes, 0 if there is no limit; and bytes that get no token."""
        if any(token.lstrip or token.rstrip for token in self.backend.get_added_tokens_decoder().values()):
            return 0, b""  # these take any number of blanks
        missing: list[int] = []
        if self._spelling == "bytes":
            missing = [byte for char, byte in BYTE_LEVEL_ALPHABET.items() if self.backend.token_to_id(char) is None]
        elif len(self._bytes_by_id) < 256:  # what it has no token for becomes one, however much that is
            return 0, b""
        longest = max(len(self.token_bytes(token_id)) for token_id in self.backend.get_vocab().values())
        return longest * _shrinkage(self.backend.normalizer), bytes(missing)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these ids; ids that are no tokens are left out."""
        detokenizer = self.detokenizer(skip_special_tokens)
        return detokenizer.add(ids) + detokenizer.flush()

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """What turns ids into text as they come."""
        hidden = self.special_ids if skip_special_tokens else frozenset()

        def is_shown(token_id: int) -> bool:
            return token_id not in hidden and (token_id in self._token_bytes or self._token(token_id) is not None)

        if self._spelling == "bytes":
            return ByteLevelDetokenizer(is_shown, self.token_bytes)
        if self._spelling == "other":
            byte_ids = frozenset(self._bytes_by_id)
            return WindowDetokenizer(
                is_shown, lambda ids: self.backend.decode(ids, skip_special_tokens=False), byte_ids
            )
        strips = self._spelling == "stripped pieces"
        return PieceDetokenizer(is_shown, self._piece, self._bytes_by_id, strips)

    def _token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id) if token_id >= 0 else None

    def _piece(self, token_id: int) -> str:
        return (self._token(token_id) or "").replace(BLANK, " ")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for: part of a character, perhaps. b"" for an id that is no token."""
        if (known := self._token_bytes.get(token_id)) is None:
            token = self._token(token_id)
            if token is None:
                return b""
            known = self._token_bytes[token_id] = self._bytes_of(token_id, token)
        return known

    def _bytes_of(self, token_id: int, token: str) -> bytes:
        if token_id in self._added_ids:
            return token.encode()
        if (byte := self._bytes_by_id.get(token_id)) is not None:
            return bytes([byte])
        if self._spelling == "bytes":
            spelled = [BYTE_LEVEL_ALPHABET.get(char) for char in token]
            return token.encode() if None in spelled else bytes(spelled)  # type: ignore[arg-type]
        return token.replace(BLANK, " ").encode()

    def token_text(self, token_id: int) -> str:
        """What one token stands for as text, with U+FFFD for what is no whole character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def use_chat_template(self, template: str) -> None:
        """Replaces the chat template. Raises `UsageError` for one that is no Jinja."""
        from jinja2 import TemplateSyntaxError

        self._hf.chat_template = template
        try:
            self.apply_chat_template([{"role": "user", "content": ""}])
        except UsageError as error:  # it may want other messages
            if isinstance(wrong := error.__cause__, TemplateSyntaxError):
                reason = f"line {wrong.lineno}: {wrong.message}"
                raise UsageError(f"chat_template is not valid Jinja ({reason})", "chat_template") from error

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> str:
        """A conversation as the text of a prompt, to be encoded without special tokens, which the template writes.

        `variables` go to the template (`tools`, `enable_thinking`, …), and `chat_template`, `add_generation_prompt` and
        `continue_final_message` to transformers. Raises `UsageError` when there is no template or it refuses the
        messages.
        """
        settings = dict(variables or {})
        template = settings.get("chat_template") or self._hf.chat_template
        if not template:
            raise UsageError("this model has no chat template: use the completions API, or give one", "messages")
        settings.setdefault("add_generation_prompt", not settings.get("continue_final_message"))

        def render(messages: Messages) -> str:
            return self._hf.apply_chat_template(messages, tokenize=False, **settings)

        try:
            return render_chat(messages, str(template), render)
        except Exception as error:  # a template can raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"the chat template refuses these messages: {reason}", "messages") from error


def load_tokenizer(args: EngineArgs, source: ModelSource) -> Tokenizer:
    """The tokenizer that the arguments name, or else the model's own; raises `UsageError` if there is none."""
    if (path := args.tokenizer or source.tokenizer_path) is None:
        raise UsageError(
            f"{source.path} has no tokenizer: name one with tokenizer, or set skip_tokenizer_init", "tokenizer"
        )
    tokenizer = Tokenizer.from_source(path)
    if args.chat_template is not None:
        tokenizer.use_chat_template(read_chat_template(args.chat_template))
    return tokenizer
