"""Requests in, streams out: tokenises, sends sequences to a driver, detokenises what comes back."""

from __future__ import annotations

import asyncio
import logging
import random
from array import array
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from rayllm.config import EngineConfig
from rayllm.engine import Engine
from rayllm.errors import EngineDeadError, UsageError
from rayllm.model_source import resolve_model
from rayllm.output import Choice, Increment
from rayllm.sampling_params import SamplingParams
from rayllm.step import Abort, AddClient, AddSequence, ClientMessage, EngineDied, pack_ids
from rayllm.tokenizer import Tokenizer
from rayllm.transport import Receiver, Sender, local_host

logger = logging.getLogger("rayllm")

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""Text, token ids, or chat messages."""

CLIENT = 0
"""This process's number at its own engine's driver."""


@dataclass(eq=False)
class Request:
    """A request that is being answered."""

    choices: dict[int, Choice]
    """By sequence; those that are not finished."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    error: str | None = None


class AsyncLLM:
    """An engine of one's own, for use inside an event loop.

        async with AsyncLLM("/path/to/model") as llm:
            async for increment in llm.generate("Hello", SamplingParams(max_tokens=32)):
                print(increment.text, end="")

    Keyword arguments are the fields of `EngineConfig`. Construction blocks until the engine is ready; it raises
    `UsageError` for what cannot work.
    """

    def __init__(self, model: str, *, address: str | None = None, progress: bool = True, **arguments: Any):
        config = EngineConfig.of(model=model, **arguments)
        source = resolve_model(config.model, config.load_format, progress=progress)
        self.vocab_size = source.config.vocab_size
        self.tokenizer: Tokenizer | None = None
        if not config.skip_tokenizer_init:
            if (path := config.tokenizer or source.tokenizer_path) is None:
                raise UsageError(f"{source.path} has no tokenizer: name one with tokenizer, or set skip_tokenizer_init")
            self.tokenizer = Tokenizer.from_source(path)
        self.engine = Engine(config, source, address, progress)
        self.config = self.engine.config
        info = self.engine.info
        self._inbox: Receiver[ClientMessage] = Receiver(ClientMessage, local_host() if info.spans_nodes else None)
        self._driver = Sender(info.address)
        self._driver.send(AddClient(CLIENT, self._inbox.address))
        self._random = random.Random(self.config.seed)
        self._next_sequence = 0
        self._requests: dict[int, Request] = {}
        """Of each sequence that is not finished."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._death: str | None = None
        self._is_closed = False

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine; requests that are not finished raise `EngineDeadError`."""
        if self._is_closed:
            return
        self._is_closed = True
        self._fail("the engine was closed")
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._inbox)
            self._watcher.cancel()
        self._driver.close(linger_s=1)
        self._inbox.close()
        self.engine.close()

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, cache_salt: str | None = None
    ) -> AsyncGenerator[Increment]:
        """Yields what is new whenever something is, for each of `params.n` choices, the last with `finish_reason`.

        A consumer that is behind gets several tokens at once. Leaving the iteration early aborts the request.
        Raises `UsageError` for a prompt that cannot be served, `EngineDeadError` when the engine is gone.
        """
        params = params or SamplingParams()
        return self.answer(self.prepare(prompt, params), params, cache_salt)

    async def answer(
        self, token_ids: list[int], params: SamplingParams, cache_salt: str | None = None
    ) -> AsyncGenerator[Increment]:
        """As `generate`, for a prompt that `prepare` let pass."""
        self._attach()
        request = self._send(token_ids, params, cache_salt)
        try:
            while request.choices:
                await request.changed.wait()
                request.changed.clear()
                if request.error:
                    raise EngineDeadError(request.error)
                for sequence, choice in list(request.choices.items()):
                    increment = choice.take()
                    if increment is None:
                        continue
                    if increment.finish_reason:
                        self._forget(sequence, request, abort=not choice.is_ended)
                    yield increment
        finally:
            for sequence in list(request.choices):
                self._forget(sequence, request, abort=True)

    def prepare(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """The prompt's token ids; raises `UsageError` if this engine cannot serve them with `params`."""
        token_ids = self._tokenize(prompt)
        assert self.config.max_model_len is not None
        if not token_ids:
            raise UsageError("the prompt is empty: give at least one token")
        if len(token_ids) >= self.config.max_model_len:
            raise UsageError(
                f"the prompt has {len(token_ids)} tokens, at most {self.config.max_model_len - 1} leave room for an "
                f"answer in the context of {self.config.max_model_len}"
            )
        if not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            raise UsageError(f"token ids must be 0 to {self.vocab_size - 1}, the model's vocabulary")
        if any(
            not 0 <= token_id < self.vocab_size for token_id in (*(params.logit_bias or ()), *params.stop_token_ids)
        ):
            raise UsageError(f"token ids in logit_bias and stop_token_ids must be 0 to {self.vocab_size - 1}")
        if params.stop_strings and self.tokenizer is None:
            raise UsageError("stop strings need the tokenizer, which skip_tokenizer_init left out")
        return token_ids

    def _tokenize(self, prompt: Prompt) -> list[int]:
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and all(isinstance(item, dict) for item in prompt)
        if not is_chat and not isinstance(prompt, str):
            try:
                return array("i", cast(Sequence[int], prompt)).tolist()
            except (TypeError, OverflowError):
                raise UsageError("a prompt must be a string, a list of token ids or a list of chat messages") from None
        if self.tokenizer is None:
            raise UsageError("only token ids can be prompts when skip_tokenizer_init is set")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.apply_chat_template(list(prompt))  # type: ignore[arg-type]

    def _attach(self) -> None:
        """Ties this object to the running event loop, on first use."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._inbox, self._receive)
            self._watcher = self._loop.create_task(self._watch())
            self._receive()
        if self._death:
            raise EngineDeadError(self._death)

    def _send(self, token_ids: list[int], params: SamplingParams, cache_salt: str | None) -> Request:
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        request, packed = Request({}), pack_ids(token_ids)
        for i in range(params.n):
            sequence = self._next_sequence
            self._next_sequence += 1
            request.choices[sequence] = Choice(i, len(token_ids), params, self.tokenizer)
            self._requests[sequence] = request
            own_seed = (seed + i + 2**63) % 2**64 - 2**63
            self._driver.send(AddSequence(CLIENT, sequence, packed, params, own_seed, cache_salt))
        return request

    def _forget(self, sequence: int, request: Request, abort: bool) -> None:
        del request.choices[sequence]
        self._requests.pop(sequence, None)
        if abort and not self._death:
            self._driver.send(Abort(CLIENT, [sequence]))

    def _receive(self) -> None:
        for message in self._inbox.receive(timeout_s=0):
            if isinstance(message, EngineDied):
                self._fail(message.reason)
                continue
            for update in message.updates:
                if (request := self._requests.get(update.sequence)) is not None:
                    request.choices[update.sequence].add(update)
                    request.changed.set()

    async def _watch(self) -> None:
        """Fails all requests when the driver is gone: ZeroMQ would not tell."""
        try:
            await self.engine.ended
            self._fail("the engine was stopped")
        except Exception as error:
            await asyncio.sleep(0.1)  # its own last words say more
            self._fail(f"the driver died: {type(error).__name__}")

    def _fail(self, reason: str) -> None:
        if self._death is None:
            self._death = reason
            for request in self._requests.values():
                request.error = reason
                request.changed.set()
            self._requests.clear()
