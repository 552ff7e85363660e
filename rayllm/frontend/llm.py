"""Offline use: a list of prompts in, a list of results out."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rayllm.errors import EngineDeadError, UsageError
from rayllm.frontend.async_llm import AsyncLLM
from rayllm.frontend.bridge import Bridge
from rayllm.frontend.client import Prompt
from rayllm.frontend.output import Increment, joined
from rayllm.frontend.tokenizer import Tokenizer
from rayllm.messages.step import Logprobs
from rayllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Params = SamplingParams | Mapping[str, Any]
"""Sampling parameters, or a dict of their fields."""
Message = dict[str, Any]
"""A chat message: role, content and whatever else the chat template knows."""


class LLM:
    """An engine for scripts.

        with LLM("/path/to/model") as llm:
            print(llm.generate(["Hello"], SamplingParams(max_tokens=32))[0]["text"])

    Keyword arguments are the fields of `EngineArgs`; `address` names a Ray cluster, by default one is started on this
    machine. Construction blocks until the engine is ready; it raises `UsageError` for what cannot work, and
    `EngineDeadError` when a process of the engine fails. Without `with`, `close` ends it; so do the end of the object
    and of the process.
    """

    def __init__(self, model: str, *, address: str | None = None, progress: bool = True, **arguments: Any):
        self.async_llm = AsyncLLM(model, address=address, progress=progress, **arguments)
        self.async_llm.start()
        self._bridge = Bridge()
        self._finalizer = weakref.finalize(self, self._bridge.close, self.async_llm.close)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine; calls of other threads that are not finished raise `EngineDeadError`."""
        self._finalizer()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Answers all prompts, in order.

        A prompt is a string, a list of token ids or a list of chat messages; `sampling_params`, or dicts of their
        fields, are one for all or one for each; without any, or where dicts say nothing, the model's own defaults hold.
        `use_tqdm` shows a bar on stderr, if that is a terminal. Each result has `text`, `token_ids`, `finish_reason`,
        `num_cached_tokens`, `num_pruned_tokens`, with n > 1 all `choices` (the first one's fields stand beside them),
        and `logprobs` and `prompt_logprobs` when asked for: for each token a dict {token id: log-probability}, the
        token itself first.

        Raises `UsageError` before anything is computed if any prompt cannot be served.
        """
        prompt_list = _as_list(prompts)
        params = self._params_of_each(sampling_params, len(prompt_list))
        token_ids = [self.async_llm.client.prepare(p, s) for p, s in zip(prompt_list, params, strict=True)]
        with _Rates(len(prompt_list), use_tqdm) as rates:
            return self._bridge.run(lambda: self._generate_all(token_ids, params, rates))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params | Sequence[Params] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """`generate` for one conversation, or a list of them; the result is a list in either case.

        A Jinja `chat_template` stands in for the model's own; `tools` and `chat_template_kwargs` are variables of it.
        `continue_final_message` has the last message gone on with; otherwise, or with `add_generation_prompt`, an
        answer is begun. Raises `UsageError` when the template refuses the messages, and what `generate` raises.
        """
        if not isinstance(messages, Sequence) or any(isinstance(item, str) for item in messages):
            raise UsageError("messages must be a list of chat messages, or a list of such lists", "messages")
        conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        given = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
        } | (chat_template_kwargs or {})
        tokenizer = self._tokenizer()
        prompts = [
            tokenizer.encode(tokenizer.apply_chat_template(conversation, given), add_special_tokens=False)
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def get_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer as transformers has it: a copy, so that nothing set there reaches the engine."""
        return self._tokenizer().transformers

    def _tokenizer(self) -> Tokenizer:
        if self.async_llm.tokenizer is None:
            raise UsageError("there is no tokenizer: skip_tokenizer_init left it out", "skip_tokenizer_init")
        return self.async_llm.tokenizer

    def stream(self, prompt: Prompt, params: Params | None = None) -> Iterator[Increment]:
        """`AsyncLLM.generate` as an ordinary iterator; leaving it early aborts the request."""
        increments = self.async_llm.generate(prompt, params)
        try:
            while (increment := self._bridge.run(lambda: anext(increments, None))) is not None:
                yield increment
        finally:
            with contextlib.suppress(EngineDeadError):  # closed, by whomever: then there is nothing to abort
                self._bridge.run(increments.aclose)

    def _params_of_each(self, given: Params | Sequence[Params] | None, number: int) -> list[SamplingParams]:
        """One for each of so many prompts."""
        client = self.async_llm.client
        if not isinstance(given, list | tuple):
            return [client.sampling_params(given)] * number  # type: ignore[arg-type]
        if len(given) != number:
            raise UsageError(
                f"{len(given)} sampling params for {number} prompts: give one, or one for each", "sampling_params"
            )
        return [client.sampling_params(own) for own in given]

    async def _generate_all(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], rates: _Rates
    ) -> list[dict[str, Any]]:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._generate(prompt, own, rates))
                for prompt, own in zip(prompts, params, strict=True)
            ]
        return [task.result() for task in tasks]

    async def _generate(self, prompt: Sequence[int], params: SamplingParams, rates: _Rates) -> dict[str, Any]:
        is_prefilled = False

        def count(increment: Increment) -> None:
            nonlocal is_prefilled
            if increment.index == 0 and not is_prefilled:
                is_prefilled = True
                rates.prefilled(increment.num_prompt_tokens - increment.num_cached_tokens)
            rates.decoded(len(increment.token_ids))

        increments = self.async_llm.client.answer([prompt], params)
        choices = [_result(choice, params) for choice in await joined(increments, count)]
        rates.finished()
        return choices[0] | ({"choices": choices} if params.n > 1 else {})


def _as_list(prompts: Any) -> list[Prompt]:
    """A single prompt becomes a list of one; raises `UsageError` for what is no prompt."""
    if isinstance(prompts, Mapping):
        raise UsageError("a prompt must be a string, a list of token ids or a list of chat messages", "prompts")
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int | dict)):
        return [prompts]
    return list(prompts)


def _result(choice: Increment, params: SamplingParams) -> dict[str, Any]:
    result = {
        "text": choice.text,
        "token_ids": choice.token_ids,
        "num_cached_tokens": choice.num_cached_tokens,
        "num_pruned_tokens": choice.num_pruned_tokens,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if params.logprobs is not None:
        result["logprobs"] = list(map(_as_dict, choice.logprobs))
    if params.prompt_logprobs is not None:
        result["prompt_logprobs"] = [None, *map(_as_dict, choice.prompt_logprobs)]
    return result


def _as_dict(entry: Logprobs) -> dict[int, float]:
    return dict(zip(entry.token_ids, entry.logprobs, strict=True))


class _Rates:
    """A bar over requests that shows prompt tokens and output tokens per second, over the whole call."""

    def __init__(self, total: int, is_shown: bool):
        self._bar = tqdm(total=total, desc="generating", unit="req", disable=not is_shown or None, dynamic_ncols=True)
        self._start = time.monotonic()
        self._prefilled = self._decoded = 0

    def __enter__(self) -> _Rates:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def prefilled(self, num_tokens: int) -> None:
        self._prefilled += num_tokens

    def decoded(self, num_tokens: int) -> None:
        self._decoded += num_tokens
        if not self._bar.disable:
            seconds = time.monotonic() - self._start
            self._bar.set_postfix_str(
                f"prefill {self._prefilled / seconds:.0f} tok/s, decode {self._decoded / seconds:.0f} tok/s",
                refresh=False,
            )

    def finished(self) -> None:
        self._bar.update()
