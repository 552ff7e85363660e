"""The end of an engine that owns requests: prompts in, increments out."""

from __future__ import annotations

import asyncio
import itertools
import random
from array import array
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import msgspec
import numpy as np
import ray

from rayllm.config import EngineConfig
from rayllm.errors import ContextLengthError, EngineDeadError, UsageError
from rayllm.frontend.aside import LARGE
from rayllm.frontend.grammar import grammar_of
from rayllm.frontend.output import Choice, Increment
from rayllm.frontend.tokenizer import Tokenizer
from rayllm.messages.base import pack_ids
from rayllm.messages.sequences import NewSequence, Updates
from rayllm.messages.transport import Address, Receiver
from rayllm.model_config import ModelConfig, known_ids
from rayllm.sampling_params import SamplingParams, SnapkvLimit

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""Text, token ids, or chat messages."""

READERS_AT_ONCE = 16
"""Readers that are told of new tokens before the event loop does something else."""
TURNS = 4
"""Turns of the event loop in which what follows from new tokens is done."""
MAX_DEATHS = 6
"""A choice on which so many engines die in a row, without a new token, is given up: it may be what they die of."""


class Link(Protocol):
    """How a client reaches an engine: in its own process, or through Ray Serve."""

    async def answer(self, client: Address, sequence: NewSequence) -> None:
        """Lasts until the sequence, whose tokens go to `client`, has ended; cancelled, it aborts it.

        Raises `EngineDeadError` when it cannot end any more.
        """

    async def recover(self) -> bool:
        """After an `EngineDeadError`: waits until there is an engine again; False if there will be none."""


@dataclass(eq=False)
class Stream:
    """One choice that is being answered."""

    choice: Choice
    changed: asyncio.Event
    """Set when there is something new of this choice, or of another of the same request."""
    sequence_id: int
    call: asyncio.Future[None]
    """The call of `Link.answer` that lasts until the sequence has ended."""
    num_tokens: int
    """Output tokens that the choice had when this sequence began."""
    num_deaths: int
    """Engines that died on the choice since its last new token."""


class Client:
    """Sends prompts to an engine and turns what comes back into text. Belongs to one event loop.

    `host`: this node's address, if engines may run on other nodes.
    """

    def __init__(
        self,
        link: Link,
        config: EngineConfig,
        model: ModelConfig,
        tokenizer: Tokenizer | None,
        host: str | None = None,
    ):
        self._config = config
        self.max_model_len = config.max_model_len
        self.vocab_size = model.vocab_size
        self.tokenizer = tokenizer
        named = tokenizer.eos_token_ids if tokenizer else ()
        own_ends = known_ids(named, model.vocab_size, "the tokenizer's eos_token")
        self._eos_token_ids = list(dict.fromkeys(model.eos_token_ids + own_ends))
        self._link = link
        self._random = random.Random(config.seed)
        self._inbox: Receiver[Updates] = Receiver(Updates, host)
        self._address = self._inbox.address(ray.get_runtime_context().get_node_id())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next_sequence_id = 0
        self._streams: dict[int, Stream] = {}
        """What is being answered, by `sequence_id`."""
        self._news: dict[int, Stream] = {}
        """Those whose readers are to be told of new tokens, the longest waiting first, by `sequence_id`."""
        self._has_news = asyncio.Event()

    def close(self) -> None:
        """Hears of no more tokens; answers that are not finished stay without an end."""
        if self._loop is not None and not self._loop.is_closed():
            for fileno in self._inbox.filenos():
                self._loop.remove_reader(fileno)
            self._teller.cancel()
        self._inbox.close()

    # ---- prompts

    def sampling_params(self, given: SamplingParams | Mapping[str, Any] | None) -> SamplingParams:
        """Those of a request: as they are, or what their fields hold, elsewhere the model's defaults.

        Raises `UsageError`.
        """
        if isinstance(given, SamplingParams):
            return given
        if not isinstance(given, Mapping | None):
            raise UsageError(f"sampling params must be SamplingParams or a dict, not {given!r}", "sampling_params")
        return SamplingParams(**dict(self._config.sampling_defaults) | dict(given or {}))

    def encode(self, text: str, field: str = "prompt", add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt, which came as `field`; raises `UsageError` for one whose mere size is too much."""
        if self.tokenizer is None:
            raise UsageError("only token ids can be prompts when skip_tokenizer_init is set", field)
        if len(text) > max(self.max_model_len, LARGE):
            self._check_length(self.tokenizer.least_tokens(text), field, "at least ")
        return self.tokenizer.encode(text, add_special_tokens)

    def prepare(self, prompt: Prompt, params: SamplingParams) -> array[int]:
        """The prompt's token ids; raises `UsageError` if this engine cannot serve them with `params`."""
        token_ids = self._tokenize(prompt)
        self.check(token_ids, params)
        return token_ids

    def check(self, token_ids: Sequence[int], params: SamplingParams, field: str = "prompt") -> None:
        """Raises `UsageError` if this engine cannot serve the prompt, which came as `field`, with `params`."""
        if not token_ids:
            raise UsageError("the prompt is empty: give at least one token", field)
        self._check_length(len(token_ids), field)
        ids = np.asarray(token_ids)
        if not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise UsageError(f"token ids must be 0 to {self.vocab_size - 1}, the model's vocabulary", field)
        for name, named in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
            if not all(0 <= token_id < self.vocab_size for token_id in named):
                raise UsageError(f"token ids in {name} must be 0 to {self.vocab_size - 1}", name)
        if params.snapkv_limit is not None:
            self._check_snapkv_limit(params.snapkv_limit)
        if params.structured_outputs is not None:
            if self.tokenizer is None or not self.tokenizer.can_be_masked(self.vocab_size):
                raise UsageError(
                    "structured_outputs need a byte-level or SentencePiece tokenizer whose tokens the model all has",
                    "structured_outputs",
                )
            grammar_of(params.structured_outputs)
        if params.stop_strings and self.tokenizer is None:
            raise UsageError("stop strings need the tokenizer, which skip_tokenizer_init left out", "stop")

    def _check_length(self, num_tokens: int, field: str, about: str = "") -> None:
        longest = self.max_model_len
        if num_tokens >= longest:
            raise ContextLengthError(
                f"this model's maximum context length is {longest} tokens, but the prompt has {about}{num_tokens}: "
                f"{longest - 1} leave room for an answer",
                field,
            )

    def _check_snapkv_limit(self, limit: SnapkvLimit) -> None:
        config, name = self._config, "snapkv_limit"
        if not config.enable_snapkv:
            raise UsageError(
                "snapkv_limit must be left out: this engine runs without enable_snapkv and prunes nothing", name
            )
        least = config.min_snapkv_limit
        if limit != "all" and not least <= limit <= config.snapkv_limit:
            raise UsageError(f"{name} must be {least} to {config.snapkv_limit}, 'all' or None, not {limit}", name)

    def _tokenize(self, prompt: Prompt) -> array[int]:
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and all(isinstance(item, dict) for item in prompt)
        if not is_chat and not isinstance(prompt, str):
            try:
                return array("i", cast(Sequence[int], prompt))
            except (TypeError, OverflowError):
                raise UsageError(
                    "a prompt must be a string, a list of token ids or a list of chat messages", "prompt"
                ) from None
        if isinstance(prompt, str) or self.tokenizer is None:
            return array("i", self.encode(str(prompt)))
        text = self.tokenizer.apply_chat_template(cast(Sequence[dict[str, Any]], prompt))
        return array("i", self.encode(text, add_special_tokens=False))  # the template writes them

    # ---- answers

    async def answer(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, cache_salt: str | None = None
    ) -> AsyncGenerator[Increment]:
        """Yields what is new whenever something is, for each prompt's `params.n` choices, numbered in a row.

        The prompts have passed `check`. Leaving the iteration early aborts the request. When the engine dies and
        there is another, choices go on there from the tokens that came so far, but not beyond `MAX_DEATHS`.
        """
        self._attach()
        changed = asyncio.Event()
        streams = [self._start(choice, changed, cache_salt) for choice in self._new_choices(prompts, params)]
        try:
            while streams:
                await changed.wait()
                changed.clear()
                for stream in tuple(streams):
                    if (increment := stream.choice.take()) is not None:
                        if increment.finish_reason:
                            streams.remove(stream)
                            self._stop(stream)
                        yield increment
                        if increment.finish_reason:
                            continue
                    if stream.call.done() and (error := stream.call.exception()):
                        num_deaths = 1 if len(stream.choice.token_ids) > stream.num_tokens else stream.num_deaths + 1
                        is_death = isinstance(error, EngineDeadError)
                        if not is_death or num_deaths >= MAX_DEATHS or not await self._link.recover():
                            raise error
                        if stream.choice.has_news:  # perhaps its last
                            changed.set()
                            continue
                        self._stop(stream)
                        again = self._start(stream.choice, changed, cache_salt, num_deaths)
                        streams[streams.index(stream)] = again
        finally:
            for stream in streams:
                self._stop(stream)

    def _new_choices(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Choice]:
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        return [
            Choice(
                index=number * params.n + i,
                prompt_token_ids=prompt,
                params=params,
                seed=(seed + i + 2**63) % 2**64 - 2**63,
                tokenizer=self.tokenizer,
            )
            for number, prompt in enumerate(prompts)
            for i in range(params.n)
        ]

    def _start(self, choice: Choice, changed: asyncio.Event, cache_salt: str | None, num_deaths: int = 0) -> Stream:
        sequence_id = self._next_sequence_id
        self._next_sequence_id += 1
        params, grammar = choice.params, None
        if params.structured_outputs is not None:  # which travel as a grammar
            grammar = grammar_of(params.structured_outputs)
            params = msgspec.structs.replace(params, structured_outputs=None)
        message = NewSequence(
            sequence_id=sequence_id,
            token_ids=pack_ids(choice.prompt_token_ids) + pack_ids(choice.token_ids),
            num_prompt_tokens=len(choice.prompt_token_ids),
            params=params,
            seed=choice.seed,
            grammar=grammar,
            cache_salt=cache_salt,
            eos_token_ids=self._eos_token_ids,
        )
        call = asyncio.ensure_future(self._link.answer(self._address, message))
        call.add_done_callback(lambda call: changed.set() if call.cancelled() or call.exception() else None)
        stream = Stream(choice, changed, sequence_id, call, len(choice.token_ids), num_deaths)
        self._streams[sequence_id] = stream
        return stream

    def _stop(self, stream: Stream) -> None:
        stream.call.cancel()  # nothing if it has ended
        del self._streams[stream.sequence_id]
        self._news.pop(stream.sequence_id, None)

    def _attach(self) -> None:
        """Ties this object to the running event loop, on first use."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            for fileno in self._inbox.filenos():
                self._loop.add_reader(fileno, self._receive)
            self._teller = self._loop.create_task(self._tell())
            self._receive()

    def _receive(self) -> None:
        for message in self._inbox.receive(timeout_s=0):
            for update in message.updates:
                if (stream := self._streams.get(update.sequence_id)) is None:
                    continue
                if not stream.choice.token_ids:
                    stream.changed.set()  # a first token does not wait
                else:
                    self._news[update.sequence_id] = stream
                stream.choice.add(update)
        if self._news:
            self._has_news.set()

    async def _tell(self) -> None:
        """Tells the readers of new tokens, few at once and for half of the time at most: what they set off leaves the
        event loop free for new requests, however many streams there are. Who is told late gets several tokens."""
        loop = asyncio.get_running_loop()
        while await self._has_news.wait():
            began = loop.time()
            for sequence_id in tuple(itertools.islice(self._news, READERS_AT_ONCE)):
                self._news.pop(sequence_id).changed.set()
            if not self._news:
                self._has_news.clear()
            for _ in range(TURNS):
                await asyncio.sleep(0)
            await asyncio.sleep(loop.time() - began)
