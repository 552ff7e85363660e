"""Grammars of lanes: which tokens may come next, by llguidance.

A step's forward is launched before its masks are made: these wait for the tokens of the steps before it, which the
device computes meanwhile. Only rank 0 makes masks, and draws with them.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import llguidance
import numpy as np
import torch

from rayllm.checkpoint.tokenizer import read_tokenizer
from rayllm.messages.step import LaneStart
from rayllm.model_config import ModelConfig, known_ids
from rayllm.runner.device import HostCopies

logger = logging.getLogger("rayllm")

COMPILERS = 8
"""Grammars that are compiled at once, beside the steps."""


class LaneGrammar:
    """The grammar of one start of a lane. Rows in flight after an end or a preemption belong to it still, and do
    nothing to whoever has the lane next."""

    def __init__(self, matcher: Future[llguidance.LLMatcher]):
        self._matcher = matcher
        self._has_ended = False

    @property
    def matcher(self) -> llguidance.LLMatcher | None:
        """What says which token comes next, once it is compiled; None if the answer has ended or nothing can say it."""
        return None if self._has_ended or self._trouble() else self._matcher.result()

    def _trouble(self) -> str:
        """Why there is no matcher, in a line; waits until it is compiled."""
        if (error := self._matcher.exception()) is not None:
            return " ".join(f"{type(error).__name__}: {error}".split())
        return " ".join(self._matcher.result().get_error().split())

    def advance(self, token_id: int) -> str | None:
        """Takes in a sampled token; why the answer ends with it: "stop" where the grammar does, "length" where
        llguidance's limits cut it off; None if it goes on."""
        if self._has_ended:  # with a token before: this one is dropped
            return None
        if (matcher := self.matcher) is not None:
            matcher.consume_token(token_id)
        if trouble := self._trouble():
            self._has_ended = True
            logger.warning("an answer is cut off: %s", trouble)
            return "length"
        self._has_ended = self._matcher.result().is_stopped()
        return "stop" if self._has_ended else None


class SampledTokens:
    """Tokens of one step on their way to the host, and the grammars that they belong to, by their index."""

    def __init__(self, copies: HostCopies, token_ids: torch.Tensor, grammars: Sequence[tuple[int, LaneGrammar]]):
        self._copies = copies
        self._token_ids = token_ids
        self._grammars = grammars
        self._lock = threading.Lock()
        self._ends: dict[int, str] | None = None

    def ends(self) -> dict[int, str]:
        """Why answers end with these tokens, by the token's index; waits for them, and advances the grammars once."""
        with self._lock:
            if self._ends is None:
                self._copies.wait()
                advanced = {index: grammar.advance(int(self._token_ids[index])) for index, grammar in self._grammars}
                self._ends = {index: reason for index, reason in advanced.items() if reason}
            return self._ends


class Grammars:
    """The grammars of all lanes. `tokenizer_path`: where the tokenizer is; without one there are no grammars."""

    def __init__(self, tokenizer_path: str | None, model: ModelConfig):
        self._vocab_size = model.vocab_size
        self._lanes: dict[int, LaneGrammar] = {}
        self._unread: deque[SampledTokens] = deque()
        self._compilers = ThreadPoolExecutor(COMPILERS, thread_name_prefix="grammars")
        if tokenizer_path is not None:  # takes seconds, before the first grammar comes
            self._tokenizer = self._compilers.submit(_read_tokenizer, tokenizer_path, model)

    def start(self, starts: Sequence[LaneStart]) -> None:
        """Sequences enter lanes: their grammars begin to be compiled, and to read what was answered before."""
        for start in starts:
            self._lanes.pop(start.lane, None)
            if start.grammar is not None:
                self._lanes[start.lane] = LaneGrammar(self._compilers.submit(self._compile, start))

    def of(self, lanes: np.ndarray) -> list[tuple[int, LaneGrammar]]:
        """The grammars of these lanes, by index; lanes without one are left out."""
        if not self._lanes:
            return []
        return [(index, self._lanes[lane]) for index, lane in enumerate(lanes.tolist()) if lane in self._lanes]

    def await_tokens(self, tokens: SampledTokens) -> None:
        """The masks of later steps wait for these."""
        self._unread.append(tokens)

    def masks(self, grammars: Sequence[tuple[int, LaneGrammar]], num_samples: int) -> np.ndarray:
        """[num_samples, ⌈V / 32⌉] int32: a set bit for each token that may come next, all of them in rows that have no
        grammar, or one that has ended."""
        while self._unread:
            self._unread.popleft().ends()
        masks = np.full((num_samples, -(-self._vocab_size // 32)), -1, np.int32)
        found = [(grammar.matcher, index) for index, grammar in grammars]
        going_on = [(matcher, index) for matcher, index in found if matcher is not None]
        if going_on:
            self._executor.unsafe_compute_mask_ptr(going_on, masks.ctypes.data, masks.strides[0], num_samples)
        for matcher, index in going_on:
            if matcher.is_error() or not masks[index].any():
                masks[index] = -1
        return masks

    @cached_property
    def _executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor()

    def _compile(self, start: LaneStart) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer.result(), start.grammar or "", log_level=0)
        matcher.consume_tokens(np.frombuffer(start.token_ids, np.int32)[start.num_prompt_tokens :].tolist())
        return matcher


def _read_tokenizer(path: str, model: ModelConfig) -> llguidance.LLTokenizer:
    tokenizer = read_tokenizer(path)
    ends = dict.fromkeys(model.eos_token_ids + known_ids(tokenizer.eos_token_id, model.vocab_size, path))
    text = tokenizer.backend_tokenizer.to_str()
    return llguidance.LLTokenizer(text, n_vocab=model.vocab_size, eos_token=list(ends) or None)


def masked(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """logits [S, V] float32 with −inf where `masks` [S, ⌈V / 32⌉] int32 has no bit, as `Grammars.masks` gives them."""
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    is_allowed = (masks[:, :, None] >> shifts & 1).flatten(1)[:, : logits.shape[1]]
    return logits.masked_fill(is_allowed == 0, float("-inf"))
