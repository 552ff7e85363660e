"""An engine of one's own inside an event loop: requests in, streams out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from rayllm.checkpoint.sources import resolve_model
from rayllm.config import EngineArgs, EngineConfig
from rayllm.engine.engine import Engine
from rayllm.engine.launcher import Launcher
from rayllm.errors import UsageError
from rayllm.frontend.client import Client, Prompt
from rayllm.frontend.output import Increment
from rayllm.frontend.tokenizer import Tokenizer, load_tokenizer
from rayllm.sampling_params import SamplingParams


class AsyncLLM:
    """An engine of one's own, for use inside an event loop.

        async with AsyncLLM("/path/to/model") as llm:
            async for increment in llm.generate("Hello", SamplingParams(max_tokens=32)):
                print(increment.text, end="")

    Keyword arguments are the fields of `EngineArgs`; `address` names a Ray cluster, by default one is started on this
    machine. Construction only checks the arguments; the engine starts where `async with` begins, or with `start`.
    """

    tokenizer: Tokenizer | None
    """None with skip_tokenizer_init. This and what follows are there once the engine is started."""
    engine: Engine
    config: EngineConfig
    """What the engine runs with, everything decided."""

    def __init__(self, model: str, *, address: str | None = None, progress: bool = True, **arguments: Any):
        """Raises `UsageError` for arguments that can never work."""
        self._args = EngineArgs.of(model=model, **arguments)
        self._address = address
        self._progress = progress
        self._client: Client | None = None
        self._is_closed = False

    async def __aenter__(self) -> AsyncLLM:
        self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the engine; blocks this thread, an event loop's too, until it is ready. A failed start leaves nothing.

        Raises `UsageError` for what cannot work with this model and cluster, and `EngineDeadError` when a process of
        the engine fails.
        """
        if self._client is not None:
            raise UsageError("this engine has been started before: make another")
        args = self._args
        source = resolve_model(args.model, args.load_format, progress=self._progress)
        self.tokenizer = None if args.skip_tokenizer_init else load_tokenizer(args, source)
        engine = Engine(Launcher.connect(args, source, self._address, self._progress), self._progress)
        try:
            self._client = Client(engine, engine.config, source.config, self.tokenizer, engine.host)
        except BaseException:
            engine.close()
            raise
        self.engine, self.config = engine, engine.config

    def close(self) -> None:
        """Ends the engine, if it was started; requests that are not finished raise `EngineDeadError`."""
        if self._client is not None and not self._is_closed:
            self._is_closed = True
            self._client.close()
            self.engine.close()

    @property
    def client(self) -> Client:
        """What sends prompts to the engine. Raises `UsageError` before the start."""
        if self._client is None:
            raise UsageError("this engine has not been started: use `async with AsyncLLM(…) as llm`")
        return self._client

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | Mapping[str, Any] | None = None,
        *,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Increment]:
        """Yields what is new whenever something is, for each of `params.n` choices, the last with `finish_reason`.

        A consumer that is behind gets several tokens at once. Leaving the iteration early aborts the request.
        Raises `UsageError` for a prompt that cannot be served, `EngineDeadError` when the engine is gone.
        """
        own = self.client.sampling_params(params)
        return self.client.answer([self.client.prepare(prompt, own)], own, cache_salt)
