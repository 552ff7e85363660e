"""An engine of one's own inside an event loop: requests in, streams out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from rayllm.checkpoint.sources import resolve_model
from rayllm.config import EngineConfig
from rayllm.engine.engine import Engine
from rayllm.frontend.client import Client, Prompt
from rayllm.frontend.output import Increment
from rayllm.frontend.tokenizer import load_tokenizer
from rayllm.sampling_params import SamplingParams


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
        self.tokenizer = load_tokenizer(config, source)
        self.engine = Engine(config, source, address, progress)
        self.config = self.engine.config
        self.client = Client(self.engine, self.config, source.config, self.tokenizer, self.engine.host)
        self._is_closed = False

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine; requests that are not finished raise `EngineDeadError`."""
        if not self._is_closed:
            self._is_closed = True
            self.client.close()
            self.engine.close()

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, cache_salt: str | None = None
    ) -> AsyncGenerator[Increment]:
        """Yields what is new whenever something is, for each of `params.n` choices, the last with `finish_reason`.

        A consumer that is behind gets several tokens at once. Leaving the iteration early aborts the request.
        Raises `UsageError` for a prompt that cannot be served, `EngineDeadError` when the engine is gone.
        """
        params = params or SamplingParams()
        return self.client.answer([self.client.prepare(prompt, params)], params, cache_salt)
