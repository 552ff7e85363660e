"""What answers the rows of a batch job: an engine in a process of Ray Data's, behind the endpoints of the service."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
import ray
from ray.util.placement_group import PlacementGroup, placement_group_table

from deployments.answers import ErrorBody, ErrorDetail
from deployments.batch_jobs.rows import CHAT, request_of
from deployments.config import BatchConfig
from deployments.http import error_of
from deployments.metrics import ServiceMetrics
from deployments.service import Model, Service
from rayllm.checkpoint.sources import ModelSource
from rayllm.config import EngineConfig
from rayllm.engine.engine import MAX_RESTARTS, Engine
from rayllm.engine.launcher import Launcher
from rayllm.errors import EngineDeadError, UsageError
from rayllm.frontend.client import Client
from rayllm.frontend.tokenizer import load_tokenizer
from rayllm.progress import Progress

if TYPE_CHECKING:
    import pyarrow


class Response(msgspec.Struct):
    """What the service would have answered over HTTP."""

    status_code: int
    request_id: str
    body: Any


class Error(msgspec.Struct):
    """What is wrong with a row."""

    code: str | None
    message: str


class Answer(msgspec.Struct):
    """A line of the output, as OpenAI's batch API writes it; a bad row has both its response and `error`."""

    id: str
    custom_id: str
    response: Response
    error: Error | None


class Slots:
    """An actor that knows which process has which engine's resources, and how far the engines' start is."""

    def __init__(self, groups: list[PlacementGroup]):
        self._groups = groups
        self._owners: dict[str, int] = {}
        """The number of each process' group."""
        self._num_starts: Counter[str] = Counter()
        self._progress: Progress | None = None
        self._failure: UsageError | EngineDeadError | None = None

    def claim(self, owner: str, node_id: str) -> PlacementGroup:
        """The group that was its own before its process died, or else a free one, on its node if there is one.

        Raises `EngineDeadError` for a process that has died too often.
        """
        self._num_starts[owner] += 1
        if self._num_starts[owner] > MAX_RESTARTS + 1:
            error = EngineDeadError(f"an engine's process died {self._num_starts[owner] - 1} times: its log says why")
            self.fail(error)
            raise error
        if owner not in self._owners:
            free = set(range(len(self._groups))) - set(self._owners.values())
            self._owners[owner] = min(free, key=lambda number: (_node_of(self._groups[number]) != node_id, number))
        return self._groups[self._owners[owner]]

    def report(self, progress: Progress) -> None:
        """Takes note of how far the start of an engine is."""
        self._progress = progress

    def progress(self) -> Progress | None:
        """What was reported last."""
        return self._progress

    def fail(self, error: UsageError | EngineDeadError) -> None:
        """Takes note of what an engine's process dies of: from Ray Data comes a text, an actor's traceback."""
        self._failure = error

    def failure(self) -> UsageError | EngineDeadError | None:
        """The error that was told last."""
        return self._failure


def _node_of(group: PlacementGroup) -> str:
    """The node where the group's driver will be."""
    node_id: str = placement_group_table(group)["bundles_to_node_id"][0]
    return node_id


class JobEngine:
    """A callable for `Dataset.map_batches`: the process of one engine, whose resources an actor `Slots` assigns."""

    def __init__(self, args: BatchConfig, config: EngineConfig, source: ModelSource, slots: Any):
        self._slots = slots
        context = ray.get_runtime_context()
        group = ray.get(slots.claim.remote(context.get_actor_id(), context.get_node_id()))
        try:
            self._start(args, config, source, group)
        except (UsageError, EngineDeadError) as error:
            ray.get(slots.fail.remote(error))
            raise

    def _start(self, args: BatchConfig, config: EngineConfig, source: ModelSource, group: PlacementGroup) -> None:
        engine = Engine(Launcher.on(group, config, source), progress=False, report=self._slots.report.remote)
        tokenizer = load_tokenizer(args, source.on_this_node(weights=False))
        client = Client(engine, config, source.config, tokenizer, engine.host)
        self._model = args.name
        model = Model(args.name, client, tokenizer, engine, int(time.time()), args.served_names[1:])
        self._service = Service([model], ServiceMetrics())

    async def __call__(self, rows: pyarrow.Table) -> dict[str, list[Any]]:
        """`key` and `row` (JSON) become `key`, `line` (the answer's JSON), `failed` and `tokens` (of the output).

        Raises `EngineDeadError` when no engine is left.
        """
        keys = rows["key"].to_pylist()
        try:
            answers = await asyncio.gather(*map(self._answer, keys, rows["row"].to_pylist()))
        except EngineDeadError as error:
            await self._slots.fail.remote(error)
            raise
        lines, failed, tokens = zip(*answers, strict=True)
        return {"key": keys, "line": list(lines), "failed": list(failed), "tokens": list(tokens)}

    async def _answer(self, key: str, row: bytes) -> tuple[bytes, bool, int]:
        """The answer's line, whether it is an error, and how many tokens it has.

        Raises `EngineDeadError` when no engine is left; everything else is an answer.
        """
        request_id = uuid.uuid4().hex

        def line(status: int, body: Any, error: Error | None = None) -> bytes:
            response = Response(status, request_id, body)
            return msgspec.json.encode(Answer(f"batch_req_{request_id}", key, response, error))

        try:
            url, request = request_of(row, self._model)
            endpoint: Any = self._service.chat if url == CHAT else self._service.complete
            answer = await endpoint(request_id, request)
            return line(200, answer), False, answer.usage.completion_tokens
        except EngineDeadError:
            raise
        except Exception as raised:
            found = error_of(raised)
            return line(found.status, ErrorBody(found.detail), _error(found.detail)), True, 0


def _error(detail: ErrorDetail) -> Error:
    return Error(detail.code or detail.type, detail.message)
