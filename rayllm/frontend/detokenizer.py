"""Token ids to text as they come: what `add` and finally `flush` return, joined, is the text of all ids, however they
were split, and no character is returned that a later id can change. The work for an id does not grow with their number.

Tokenizers know two spellings well, GPT-2's bytes and SentencePiece's pieces; what decodes otherwise goes through the
tokenizer's own decoder.
"""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BLANK = "\u2581"
"""SentencePiece's space."""
CONTEXT = 32
"""Ids before a text of which a decoder may ask what they are."""


class Detokenizer(ABC):
    """Base of the ways to decode. `is_shown` tells whether an id has a text at all."""

    def __init__(self, is_shown: Callable[[int], bool]):
        self._is_shown = is_shown

    def begin(self, prompt: Sequence[int]) -> None:
        """The ids that follow continue `prompt`, whose text is not returned, but for a character that it leaves
        unfinished."""
        self.add(self._last_shown(prompt, CONTEXT))

    @abstractmethod
    def add(self, ids: Iterable[int]) -> str:
        """The text that is certain with these ids, beyond what was returned before; often empty."""

    @abstractmethod
    def flush(self) -> str:
        """The rest, at the end of all ids."""

    def _last_shown(self, ids: Sequence[int], number: int) -> list[int]:
        """The last `number` ids that have a text."""
        found: list[int] = []
        for token_id in reversed(ids):
            if len(found) == number:
                break
            if self._is_shown(token_id):
                found.append(token_id)
        return found[::-1]


class ByteLevelDetokenizer(Detokenizer):
    """Each id stands for bytes, which together are UTF-8; what is not becomes U+FFFD."""

    def __init__(self, is_shown: Callable[[int], bool], token_bytes: Callable[[int], bytes]):
        super().__init__(is_shown)
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join([self._token_bytes(i) for i in ids if self._is_shown(i)]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class PieceDetokenizer(Detokenizer):
    """Each id stands for a piece of text, or for one byte: a run of bytes that is not UTF-8 is U+FFFD for each.

    `strips`: a text loses the space that it begins with, which the tokenizer put there.
    """

    def __init__(
        self, is_shown: Callable[[int], bool], piece: Callable[[int], str], bytes_by_id: dict[int, int], strips: bool
    ):
        super().__init__(is_shown)
        self._piece = piece
        self._bytes_by_id = bytes_by_id
        self._strips = strips
        self._run = bytearray()

    def begin(self, prompt: Sequence[int]) -> None:
        before = len(prompt)
        while before and (prompt[before - 1] in self._bytes_by_id or not self._is_shown(prompt[before - 1])):
            before -= 1
        self._strips = self._strips and not any(
            self._piece(prompt[i]) for i in range(before) if self._is_shown(prompt[i])
        )
        self.add(prompt[before:])

    def add(self, ids: Iterable[int]) -> str:
        text = []
        for token_id in ids:
            if not self._is_shown(token_id):
                continue
            if (byte := self._bytes_by_id.get(token_id)) is not None:
                self._run.append(byte)  # the next one can still make all invalid
            else:
                text += [self.flush(), self._stripped(self._piece(token_id))]
        return "".join(text)

    def flush(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return self._stripped(run.decode())
        except UnicodeDecodeError:
            return self._stripped(REPLACEMENT * len(run))

    def _stripped(self, text: str) -> str:
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text


class WindowDetokenizer(Detokenizer):
    """Decodes the last ids again and again, after those before them, lest the decoder take them for a beginning."""

    def __init__(self, is_shown: Callable[[int], bool], decode: Callable[[list[int]], str], byte_ids: frozenset[int]):
        super().__init__(is_shown)
        self._decode = decode
        self._byte_ids = byte_ids
        self._context: list[int] = []
        self._pending: list[int] = []
        self._num_sent = 0  # characters of decode(context + pending)

    def add(self, ids: Iterable[int]) -> str:
        self._pending += [token_id for token_id in ids if self._is_shown(token_id)]
        if not self._pending or self._pending[-1] in self._byte_ids:  # the next one can still make all invalid
            return ""
        text = self._decode(self._context + self._pending)
        if text.endswith(REPLACEMENT):  # perhaps only the first bytes of a character
            new, self._num_sent = text[self._num_sent : -1], len(text) - 1
            return new
        new = text[self._num_sent :]
        if context := self._decode(self._pending):
            self._context, self._num_sent = self._pending, len(context)
        else:
            self._context, self._num_sent = self._context + self._pending, len(text)
        self._pending = []
        return new

    def flush(self) -> str:
        text = self._decode(self._context + self._pending)[self._num_sent :]
        self._context, self._pending, self._num_sent = [], [], 0
        return text


def spelling_of(decoder: Any) -> str:
    """How a decoder of the package tokenizers spells: "bytes", "pieces", "stripped pieces" or "other"."""
    steps = steps_of(decoder)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return "bytes"
    pieces = [{"type": "Replace", "pattern": {"String": BLANK}, "content": " "}, {"type": "ByteFallback"}]
    if steps[:3] != [*pieces, {"type": "Fuse"}]:
        return "other"
    if not steps[3:]:
        return "pieces"
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return "stripped pieces" if steps[3:] == [strip] else "other"


def steps_of(component: Any) -> list[dict[str, Any]]:
    """What a decoder or normalizer of the package tokenizers consists of, as tokenizer.json has it; None of nothing."""
    if component is None:
        return []
    state: dict[str, Any] = json.loads(component.__getstate__())
    inner = state.get("decoders") or state.get("normalizers")
    return inner if state["type"] == "Sequence" and inner is not None else [state]
