"""From a sequence's tokens to what its reader gets: text, stop strings, increments."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import dataclass, field

from rayllm.frontend.tokenizer import Tokenizer
from rayllm.messages.sequences import SequenceUpdate
from rayllm.messages.step import Logprobs
from rayllm.sampling_params import SamplingParams


@dataclass
class Increment:
    """What is new of one choice."""

    index: int
    """Number of the choice: those of the first prompt come first, `n` of each."""
    text: str
    """Whole characters only; empty without a tokenizer. With the prompt's text before it, it is the text of all ids."""
    token_ids: list[int]
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""
    num_pruned_tokens: int
    """Prompt tokens whose KV was given up."""
    queue_s: float
    """How long the choice waited in the engine before it was computed."""
    finish_reason: str | None = None
    """stop or length, in the last increment."""
    stop_reason: int | str | None = None
    """The entry of `stop_token_ids` or `stop` that ended the choice; None for an end-of-sequence token."""
    logprobs: list[Logprobs] = field(default_factory=list)
    """One for each token whose text begins in the text so far, if asked for: tokens of a stop string have none."""
    text_offsets: list[int] = field(default_factory=list)
    """Where in the choice's text the tokens of `logprobs` begin, in characters."""
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    """In the first increment: one for each prompt token but the first."""

    def extend(self, later: Increment) -> None:
        """Makes this one increment of itself and of what came after it of the same choice."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.text_offsets += later.text_offsets
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


async def joined(
    increments: AsyncIterable[Increment], each: Callable[[Increment], None] | None = None
) -> list[Increment]:
    """All increments of each choice as one, in the order of the choices; `each` is told of every increment."""
    choices: dict[int, Increment] = {}
    async for increment in increments:
        if each is not None:
            each(increment)
        if increment.index in choices:
            choices[increment.index].extend(increment)
        else:
            choices[increment.index] = increment
    return [choices[index] for index in sorted(choices)]


class Choice:
    """Collects one sequence's updates, and hands out increments.

    The text of an end-of-sequence or stop token is left out; a stop string ends the text before it (after it with
    `include_stop_str_in_output`), and tokens sampled after the one that completed it are dropped.
    """

    def __init__(
        self,
        index: int,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        tokenizer: Tokenizer | None,
    ):
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.seed = seed
        self.token_ids: list[int] = []
        """The output so far: with the prompt, all that another engine needs to go on."""
        self._index = index
        self._stops = params.stop_strings
        self._detokenizer = tokenizer.detokenizer(params.skip_special_tokens) if tokenizer else None
        if self._detokenizer:
            self._detokenizer.begin(prompt_token_ids)
        self._updates: list[SequenceUpdate] = []
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self._held_entries: deque[tuple[int, Logprobs]] = deque()
        """Log-probabilities of tokens whose text begins in what is held, or later, each with where that is."""
        self._num_tokens = 0
        self._num_chars = 0
        """Length of the text that was handed out."""

    @property
    def has_news(self) -> bool:
        """Whether `take` would return something."""
        return bool(self._updates)

    def add(self, update: SequenceUpdate) -> None:
        """Takes in what the engine sent; `take` hands it out."""
        self._updates.append(update)
        self.token_ids += update.token_ids

    def take(self) -> Increment | None:
        """What came since the last call; None if nothing did."""
        updates, self._updates = self._updates, []
        if not updates:
            return None
        text, stop = "", None
        token_ids: list[int] = []
        entries: list[tuple[int, Logprobs]] = []
        for update in updates:
            token_ids += update.token_ids
            self._num_tokens += len(update.token_ids)
            num_held = len(self._held)
            self._decode(update)
            stop = self._find_stop(num_held)
            is_last = stop is not None or update.finish_reason is not None
            text += self._release(is_last)
            entries += self._release_entries(update, is_cut=stop is not None)
            if stop is not None:
                break
        last = updates[-1]
        stop_token = last.stop_token_id if last.stop_token_id in self.params.stop_token_ids else None
        return Increment(
            index=self._index,
            text=text,
            token_ids=token_ids,
            num_prompt_tokens=len(self.prompt_token_ids),
            num_cached_tokens=last.num_cached_tokens,
            num_pruned_tokens=last.num_pruned_tokens,
            queue_s=last.queue_s,
            finish_reason=last.finish_reason if stop is None else "stop",
            stop_reason=stop_token if stop is None else stop,
            logprobs=[entry for _, entry in entries],
            text_offsets=[offset for offset, _ in entries],
            prompt_logprobs=updates[0].prompt_logprobs,
        )

    def _decode(self, update: SequenceUpdate) -> None:
        """Adds the text of an update, and where its tokens begin, to what is held."""
        if self._detokenizer is None:
            self._held_entries.extend((0, entry) for entry in update.logprobs)
            return
        is_shown = update.stop_token_id is None or self.params.include_stop_str_in_output
        shown = update.token_ids if is_shown else update.token_ids[:-1]
        for number, token_id in enumerate(update.token_ids):
            if update.logprobs:
                self._held_entries.append((self._num_chars + len(self._held), update.logprobs[number]))
            if number < len(shown):
                self._held += self._detokenizer.add([token_id])
        if update.finish_reason:
            self._held += self._detokenizer.flush()

    def _release_entries(self, update: SequenceUpdate, is_cut: bool) -> list[tuple[int, Logprobs]]:
        """Takes out the entries whose tokens begin in the text that was handed out, and those that no stop string can
        take back."""
        is_all = not is_cut and (update.finish_reason is not None or not self._stops)
        number = sum(1 for offset, _ in self._held_entries if is_all or offset < self._num_chars)
        return [self._held_entries.popleft() for _ in range(number)]

    def _find_stop(self, num_old: int) -> str | None:
        """The stop string that ends first after `num_old` characters of the held text, which is cut there."""
        if self._num_tokens < self.params.min_tokens:
            return None
        starts = [(self._held.find(stop, max(0, num_old - len(stop) + 1)), stop) for stop in self._stops]
        found = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if not found:
            return None
        end, start, stop = min(found)
        self._held = self._held[: end if self.params.include_stop_str_in_output else start]
        return stop

    def _release(self, is_last: bool) -> str:
        """Takes out the held text, but for its longest end that a stop string may begin with."""
        text, keep = self._held, 0
        if not is_last and self._stops:
            longest = min(len(text), max(map(len, self._stops)) - 1)
            keep = next(
                (k for k in range(longest, 0, -1) if text.endswith(tuple(s[:k] for s in self._stops if len(s) > k))), 0
            )
        self._held = text[len(text) - keep :]
        self._num_chars += len(text) - keep
        return text[: len(text) - keep]
