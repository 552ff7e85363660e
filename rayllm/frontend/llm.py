"""Offline use: a list of prompts in, a list of results out."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from rayllm.errors import EngineDeadError, UsageError
from rayllm.frontend.async_llm import AsyncLLM
from rayllm.frontend.bridge import Bridge
from rayllm.frontend.client import Prompt
from rayllm.frontend.output import Increment, joined
from rayllm.messages.step import Logprobs
from rayllm.sampling_params import SamplingParams


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
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Answers all prompts, in order.

        A prompt is a string, a list of token ids or a list of chat messages; `sampling_params` are one for all or one
        for each; without any, the model's own defaults hold. Each result has `text`, `token_ids`, `finish_reason`,
        `num_cached_tokens`, `num_pruned_tokens`, with n > 1 all `choices` (the first one's fields stand beside them),
        and `logprobs` and `prompt_logprobs` when asked for: for each token a dict {token id: log-probability}, the
        token itself first.

        Raises `UsageError` before anything is computed if any prompt cannot be served.
        """
        prompt_list = _as_list(prompts)
        if isinstance(sampling_params, SamplingParams | None):
            sampling_params = [sampling_params or self.async_llm.client.sampling_params({})] * len(prompt_list)
        if len(sampling_params) != len(prompt_list):
            raise UsageError(
                f"{len(sampling_params)} sampling params for {len(prompt_list)} prompts: give one, or one for each",
                "sampling_params",
            )
        token_ids = [self.async_llm.client.prepare(p, s) for p, s in zip(prompt_list, sampling_params, strict=True)]
        with _Rates(len(prompt_list), use_tqdm) as rates:
            return self._bridge.run(lambda: self._generate_all(token_ids, sampling_params, rates))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Increment]:
        """`AsyncLLM.generate` as an ordinary iterator; leaving it early aborts the request."""
        increments = self.async_llm.generate(prompt, params)
        try:
            while (increment := self._bridge.run(lambda: anext(increments, None))) is not None:
                yield increment
        finally:
            with contextlib.suppress(EngineDeadError):  # closed, by whomever: then there is nothing to abort
                self._bridge.run(increments.aclose)

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
    """A single prompt becomes a list of one."""
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
        self._bar = tqdm(total=total, desc="generating", unit="req", disable=not is_shown, dynamic_ncols=True)
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
