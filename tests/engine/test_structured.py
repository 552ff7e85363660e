"""Structured output: answers keep to their grammars, and are the same whatever else an engine does."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from engine_testing import TIGHT, WHOLE, pids_of, stats_of, tokens_of

from rayllm import LLM, SamplingParams, UsageError
from rayllm.checkpoint.sources import resolve_model
from rayllm.config import EngineArgs
from rayllm.frontend.grammar import grammar_of
from rayllm.frontend.tokenizer import Tokenizer
from rayllm.messages.base import pack_ids
from rayllm.messages.step import LaneStart, StepInput
from rayllm.models.parallel import TensorParallel
from rayllm.runner.device import open_device
from rayllm.runner.executor import Executor
from rayllm.runner.loading import load_model
from rayllm.runner.output import PendingOutput
from rayllm.sampling_params import StructuredOutputs

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def keeps_to_schema(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


KINDS: list[tuple[dict[str, Any], Callable[[str], Any]]] = [
    ({"json": SCHEMA}, keeps_to_schema),
    ({"json": json.dumps(SCHEMA)}, keeps_to_schema),
    ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    ({"regex": r"[a-f]{3}-\d{2,4}"}, lambda text: re.fullmatch(r"[a-f]{3}-\d{2,4}", text)),
    ({"choice": ["red", 'gr"een\n', "漢字"]}, lambda text: text in ("red", 'gr"een\n', "漢字")),
    (
        {"grammar": 'start: WORD ("," WORD)*\nWORD: /[xyz]{1,3}/'},
        lambda text: re.fullmatch("[xyz]{1,3}(,[xyz]{1,3})*", text),
    ),
]
SHORT = KINDS[:2] + KINDS[3:5]
"""Those that end soon, whatever is sampled."""

START = Callable[..., LLM]


@pytest.fixture
def started(engines: START, smollm2: Path) -> START:
    """`started(tensor_parallel_size, **arguments)` is an engine of a tiny model that writes nonsense."""
    return functools.partial(engines, "text", tokenizer=str(smollm2))


def params(structured: dict[str, Any] | None, seed: int, **fields: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=structured, temperature=1, seed=seed, **{"max_tokens": 90} | fields)


def ask(llm: LLM, asked: list[SamplingParams]) -> list[dict[str, Any]]:
    return llm.generate([[7 + i, 8] for i in range(len(asked))], asked, use_tqdm=False)


def test_answers_keep_to_their_grammars(started: START):
    """All kinds at once, beside answers that are free; those that are cut off say so."""
    llm = started(**WHOLE)
    asked = [params(structured, seed, ignore_eos=seed == 2) for structured, _ in KINDS for seed in range(4)]
    answers = ask(llm, [*asked, *(params(None, seed, ignore_eos=True) for seed in range(4))])
    num_ended = 0
    for (_, is_right), four in zip(KINDS, (answers[i : i + 4] for i in range(0, len(asked), 4)), strict=True):
        ended = [answer for answer in four if answer["finish_reason"] == "stop"]
        assert all(is_right(answer["text"]) for answer in ended), ended
        assert all(len(answer["token_ids"]) == 90 for answer in four if answer["finish_reason"] == "length")
        num_ended += len(ended)
    assert num_ended > len(asked) / 2
    assert [len(answer["token_ids"]) for answer in answers[len(asked) :]] == [90] * 4


@pytest.mark.slow
def test_the_same_tokens_in_every_setup(started: START):
    """Many at once, alone, preempted, pruned to chunks, split over two ranks, with everything else one can ask for."""
    asked = [params(structured, seed) for seed in range(3) for structured, _ in SHORT]
    asked += [params(SHORT[0][0], 5, repetition_penalty=1.3, top_k=40), params(SHORT[0][0], 6, min_tokens=80)]
    asked += [params(None, 7, max_tokens=40), params(SHORT[0][0], 8, top_p=0.9, logit_bias={345: 5.0})]
    expected = tokens_of(ask(started(**WHOLE), asked))
    alone = [ask(started(**WHOLE), [SamplingParams()] * i + [one])[-1]["token_ids"] for i, one in enumerate(asked[:4])]
    assert alone == expected[:4]
    tight = started(**TIGHT)
    before = stats_of(tight).num_preemptions
    assert tokens_of(ask(tight, asked)) == expected
    assert stats_of(tight).num_preemptions > before
    assert tokens_of(ask(started(2, **WHOLE), asked)) == expected


def test_many_choices_and_streams(started: START):
    llm = started(**WHOLE)
    [answer] = llm.generate([[5, 6]], params(SHORT[0][0], 3, n=3), use_tqdm=False)
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 3
    streams = [
        "".join(increment.text for increment in llm.stream([5, 6], params(SHORT[0][0], 3 + i))) for i in range(3)
    ]
    assert streams == texts


def test_logprobs_are_of_what_the_model_would_say(started: START):
    """Not of what the grammar leaves."""
    llm = started(**WHOLE)
    [answer] = llm.generate([[5, 6]], params({"regex": "[a-f]{9}"}, 3, logprobs=0), use_tqdm=False)
    ids = [5, 6, *answer["token_ids"]]
    [scored] = llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    for token_id, own, told in zip(ids[2:], answer["logprobs"], scored["prompt_logprobs"][2:], strict=True):
        assert own[token_id] == pytest.approx(told[token_id], abs=1e-4)
    assert sum(next(iter(own.values())) for own in answer["logprobs"]) < -20, "it would not have said that"


def test_what_cannot_be_served(started: START):
    llm = started(**WHOLE)
    for wrong, message in (
        ({"json": {"not": {}}}, 'cannot be served: Unimplemented keys: \\["not"\\]'),
        ({"json": "{"}, "cannot be served: .*line 1 column"),
        ({"regex": "(a"}, "cannot be served: .*invalid regex"),
        ({"regex": "((a{1,1000}){1,1000}){1,1000}"}, "cannot be served: lexer error"),
        ({"grammar": "start: B"}, 'cannot be served: .*unknown name: "B"'),
        ({"json": {"enum": ["x" * 200_000]}}, "must be at most 65536 bytes"),
        ({"regex": "a", "choice": ["a"]}, "must have exactly one of"),
        ({"choice": []}, "of length >= 1"),
        ({"jason": {}}, "unknown field `jason`"),
    ):
        with pytest.raises(UsageError, match=f"^structured_outputs.*{message}") as refused:
            llm.generate([[5]], SamplingParams(structured_outputs=wrong), use_tqdm=False)
        assert "\n" not in str(refused.value)
        assert refused.value.param == "structured_outputs"


def test_steps_stay_in_flight(tiny_text_model: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch):
    """Three are executed before an answer is waited for, each forward before its masks; a row that was in flight when
    its answer ended does nothing to the lane's next sequence."""
    source = resolve_model(str(tiny_text_model))
    limits = {"max_model_len": 64, "max_num_seqs": 1, "max_num_batched_tokens": 64, "block_size": 8}
    config = EngineArgs.of(model="any", tokenizer=str(smollm2), **limits).resolve(source.config, "cpu")
    executor = Executor(load_model(config, source, TensorParallel(), open_device("cpu", [], 1)), [16])
    done = []
    forward, masks = executor.forward, executor._grammars.masks  # type: ignore[union-attr]
    monkeypatch.setattr(executor, "forward", lambda *args: done.append("forward") or forward(*args))
    monkeypatch.setattr(executor._grammars, "masks", lambda *args: done.append("masks") or masks(*args))

    def start(grammar: dict[str, Any], block: int) -> LaneStart:
        text = grammar_of(StructuredOutputs(**grammar))
        return LaneStart(0, pack_ids([5, 6, 7]), 3, [[block]], SamplingParams(), 0, [], None, text)

    def step(number: int, position: int, starts: list[LaneStart]) -> PendingOutput:
        size = 3 if starts else 1
        rows = pack_ids([0, position, size, 1, position, position + size])
        return executor.execute(StepInput(0, number, starts, [], rows, 0 if starts else 1))

    flying = [
        step(1, 0, [start({"regex": "[a-z]"}, 0)]),
        step(2, 3, []),
        step(3, 0, [start({"choice": ["0", "1"]}, 1)]),
    ]
    assert done == ["forward", "masks"] * 3
    first, late, second = (pending.wait() for pending in flying)
    assert (first.ends, late.ends, second.ends) == ({0: "stop"}, {}, {0: "stop"})
    texts = [Tokenizer.from_source(smollm2).decode(output.token_ids) for output in (first, second)]
    assert re.fullmatch("[a-z]", texts[0]) and texts[1] in ("0", "1")


@pytest.mark.slow
def test_a_killed_shard_changes_nothing(started: START):
    llm = started(seed=1, **WHOLE)
    asked = [params(structured, seed, max_tokens=100) for seed in range(4) for structured, _ in KINDS[:3]]
    expected = tokens_of(ask(llm, asked))
    streams = [llm.stream([7 + i, 8], one) for i, one in enumerate(asked)]
    outputs = [list(next(stream).token_ids) for stream in streams]
    os.kill(pids_of(llm)[-1], signal.SIGKILL)
    for stream, output in zip(streams, outputs, strict=True):
        output += [token_id for increment in stream for token_id in increment.token_ids]
    assert outputs == expected
