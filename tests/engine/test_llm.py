"""LLM and AsyncLLM as a user meets them, with a real model: text, stops, streams; and what cannot be."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import ray
import transformers
from engine_testing import SMOLLM2, WHOLE, eventually, greedy
from tiny_configs import SIZES

from rayllm import LLM, AsyncLLM, EngineDeadError, SamplingParams, UsageError
from rayllm.checkpoint.gguf import converted
from rayllm.frontend.output import Increment

PROMPT = "A short story about a fox and a river:\n"
CHAT = [{"role": "user", "content": "Hi!"}]
EOS = 2


@pytest.fixture
def llm(engines) -> LLM:
    return engines("smollm2", **SMOLLM2)


@pytest.fixture(scope="module")
def answer(engine_pool) -> dict[str, Any]:
    """To PROMPT, greedily, 32 tokens."""
    return engine_pool.get("smollm2", **SMOLLM2).generate([PROMPT], greedy(32), use_tqdm=False)[0]


def text_of(llm: LLM, token_ids: list[int]) -> str:
    assert llm.async_llm.tokenizer is not None
    return llm.async_llm.tokenizer.decode(token_ids)


# Prompts and results


def test_kinds_of_prompts(llm: LLM, smollm2: Path, reference):
    """Texts, token ids and chats; one, or many in order."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted(smollm2))
    ids = tokenizer(PROMPT).input_ids
    chat_ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    one, two, three = llm.generate([PROMPT, ids, CHAT], [greedy(5), greedy(9), greedy(7)], use_tqdm=False)
    reference("smollm2").check_greedy([ids], [one["token_ids"]], 5)
    reference("smollm2").check_greedy([ids], [two["token_ids"]], 9)
    reference("smollm2").check_greedy([chat_ids], [three["token_ids"]], 7)
    for result in (one, two, three):
        assert result["text"] == tokenizer.decode(result["token_ids"], skip_special_tokens=True)
        assert result["finish_reason"] == "length"
    for prompt, result in ((PROMPT, one), (ids, two), (CHAT, three)):
        [alone] = llm.generate(prompt, greedy(5), use_tqdm=False)
        assert alone["token_ids"] == result["token_ids"][:5]
    assert llm.generate([], use_tqdm=False) == []


def test_choices(llm: LLM):
    params = SamplingParams(n=3, seed=1, max_tokens=8, temperature=1.5)
    [result] = llm.generate([PROMPT], params, use_tqdm=False)
    assert len({choice["text"] for choice in result["choices"]}) == 3
    for choice in result["choices"]:
        assert choice["text"] == text_of(llm, choice["token_ids"])
        assert {"finish_reason", "stop_reason", "num_cached_tokens"} < choice.keys()
    assert result["text"] == result["choices"][0]["text"]


def test_as_many_params_as_prompts(llm: LLM):
    with pytest.raises(UsageError, match="2 sampling params for 3 prompts"):
        llm.generate(["a", "b", "c"], [greedy(1)] * 2, use_tqdm=False)


def test_progress_shows_rates(llm: LLM, capsys, monkeypatch):
    """On a terminal; a pipe or log gets nothing."""
    llm.generate([PROMPT] * 2, greedy(8))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    llm.generate([PROMPT] * 2, greedy(8))
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "decode" in shown
    llm.generate([PROMPT], greedy(2), use_tqdm=False)
    assert capsys.readouterr().err == ""


# The end of an answer


def test_stop_strings(llm: LLM, answer: dict[str, Any], rng):
    """Parts of the answer's text, most of them across the borders of tokens."""
    token_ids, text = answer["token_ids"], answer["text"]
    texts = [text_of(llm, token_ids[:k]) for k in range(len(token_ids) + 1)]
    stops, params = [], []
    for is_included in (False, True):
        for length in (1, 2, 5, 9, 14, 20):
            start = rng.randrange(len(text) - length)
            stops.append(text[start : start + length])
            others = ["nowhere", text[start + 1 : start + length + 4], text[-1] + "nowhere"]
            params.append(greedy(32, stop=[*others, stops[-1]], include_stop_str_in_output=is_included))
    for result, own in zip(llm.generate([PROMPT] * len(params), params, use_tqdm=False), params, strict=True):
        num_tokens = next(k for k, part in enumerate(texts) if any(stop in part for stop in own.stop_strings))
        end, start, stop = min(
            (texts[num_tokens].find(stop) + len(stop), texts[num_tokens].find(stop), stop)
            for stop in own.stop_strings
            if stop in texts[num_tokens]
        )
        assert result["text"] == text[: end if own.include_stop_str_in_output else start]
        assert result["token_ids"] == token_ids[:num_tokens]
        assert (result["finish_reason"], result["stop_reason"]) == ("stop", stop)


def test_stop_strings_that_never_come(llm: LLM, answer: dict[str, Any]):
    """What was held back comes in the end."""
    stop = answer["text"][-5:] + "#"
    [result] = llm.generate([PROMPT], greedy(32, stop=stop), use_tqdm=False)
    assert result == answer | {"num_cached_tokens": result["num_cached_tokens"]}


def test_stop_tokens(llm: LLM, answer: dict[str, Any]):
    token_ids = answer["token_ids"]
    stop = token_ids[11]
    first = token_ids.index(stop)
    hidden, shown, late = llm.generate(
        [PROMPT] * 3,
        [
            greedy(32, stop_token_ids=[stop, 7]),
            greedy(32, stop_token_ids=[stop], include_stop_str_in_output=True),
            greedy(32, stop_token_ids=[stop], min_tokens=first + 2),
        ],
        use_tqdm=False,
    )
    assert hidden["token_ids"] == shown["token_ids"] == token_ids[: first + 1]
    assert hidden["text"] == text_of(llm, token_ids[:first])
    assert shown["text"] == text_of(llm, token_ids[: first + 1])
    assert (hidden["finish_reason"], hidden["stop_reason"]) == ("stop", stop)
    assert late["token_ids"][:first] == token_ids[:first]
    assert stop not in late["token_ids"][: first + 1]
    assert len(late["token_ids"]) > first + 1


def test_end_of_sequence(llm: LLM, reference):
    params = [
        SamplingParams(temperature=0, max_tokens=50),
        SamplingParams(temperature=0, max_tokens=50, include_stop_str_in_output=True, skip_special_tokens=False),
        SamplingParams(temperature=0, max_tokens=50, min_tokens=40),
        greedy(50),
    ]
    ended, shown, late, ignored = llm.generate([CHAT] * 4, params, use_tqdm=False)
    assert ended["token_ids"][-1] == EOS
    assert EOS not in ended["token_ids"][:-1]
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", None)
    assert ended["text"] == text_of(llm, ended["token_ids"][:-1])
    assert shown["text"] == ended["text"] + "<|im_end|>"
    assert EOS not in late["token_ids"][:39]
    assert len(late["token_ids"]) >= 40
    assert len(ignored["token_ids"]) == 50
    reference("smollm2").check_greedy([llm.async_llm.client.prepare(CHAT, greedy(1))], [ignored["token_ids"]], 50)


def test_unbounded_answer_ends_with_the_context(llm: LLM):
    prompt = [5] * 300
    [result] = llm.generate([prompt], greedy(None), use_tqdm=False)
    assert len(result["token_ids"]) == 20
    assert result["finish_reason"] == "length"


# Streams


def test_stream(llm: LLM, answer: dict[str, Any]):
    """The parts make up the whole, and the first comes long before the last."""
    start = time.monotonic()
    increments, times = [], []
    for increment in llm.stream(PROMPT, greedy(32)):
        increments.append(increment)
        times.append(time.monotonic() - start)
    assert "".join(increment.text for increment in increments) == answer["text"]
    assert [token_id for increment in increments for token_id in increment.token_ids] == answer["token_ids"]
    assert [increment.finish_reason for increment in increments[:-1]] == [None] * (len(increments) - 1)
    assert increments[-1].finish_reason == "length"
    assert len(increments) > 12
    assert times[0] < times[-1] / 2


def test_leaving_a_stream_aborts(llm: LLM, answer: dict[str, Any]):
    """The fixture sees that all blocks are free again; here, that nothing was computed in vain."""
    for increment in llm.stream(PROMPT, greedy(None, n=3)):
        assert increment.finish_reason is None
        break
    for _ in llm.stream(PROMPT, greedy(250, stop=answer["text"][20:25])):
        pass
    assert llm.generate([PROMPT], greedy(32), use_tqdm=False)[0]["text"] == answer["text"]


# What cannot be: one line each, before anything expensive

REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("nowhere/at/all", {}, "no model at 'nowhere/at/all'"),
    ("nowhere.gguf", {}, "no file nowhere.gguf"),
    ("{empty}", {}, "has no config.json"),
    ("{gpt2}", {}, "unsupported architecture"),
    ("{llama}", {"max_modellen": 5}, "did you mean max_model_len?"),
    ("{llama}", {"tensor_parallel_size": 3, "skip_tokenizer_init": True}, "cannot split 4 query heads"),
    ("{llama}", {"tensor_parallel_size": "2"}, "tensor_parallel_size must be int"),
    ("{llama}", {"max_model_len": 257, "device": "cpu", "skip_tokenizer_init": True}, "at most 256 for this model"),
    ("{llama}", {"max_num_seqs": 9, "max_num_batched_tokens": 8}, "at least max_num_seqs (9)"),
    ("{llama}", {"address": "127.0.0.1:1", "skip_tokenizer_init": True}, "no Ray cluster answers at"),
    ("{llama}", {"address": "ray://127.0.0.1:1", "skip_tokenizer_init": True}, "ray://"),
    ("{llama}", {}, "no tokenizer: name one with tokenizer, or set skip_tokenizer_init"),
    ("{llama}", {"tokenizer": "/dev"}, "no tokenizer at '/dev'"),
]
SCRIPT = """
import json, sys, time
import ray
from rayllm import LLM, UsageError
for model, arguments in json.load(sys.stdin):
    start = time.monotonic()
    try:
        LLM(model, **arguments)
    except UsageError as error:
        print(json.dumps([str(error), time.monotonic() - start, ray.is_initialized()]))
"""


def test_refusals_before_ray_starts(model_paths, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    (tmp_path / "empty").mkdir()
    folders = {"{empty}": tmp_path / "empty", "{gpt2}": tmp_path, "{llama}": model_paths["llama"]}
    cases = [(str(folders.get(model, model)), arguments) for model, arguments, _ in REFUSALS]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(cases), capture_output=True, text=True, timeout=120
    )
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == len(REFUSALS), result.stderr
    for (message, seconds, has_started_ray), (_, _, expected) in zip(answers, REFUSALS, strict=True):
        assert expected in message
        assert "\n" not in message
        assert seconds < 10
        assert not has_started_ray


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_gpu_blocks_override": 15}, "max_model_len=128 needs 16 KV cache blocks .* there is room for 15"),
        pytest.param(
            {"kv_cache_memory_bytes": 150_000},
            "needs 16 KV cache blocks .* there is room for 11",
            marks=pytest.mark.slow,
        ),
        ({"tensor_parallel_size": 16}, "needs 16 CPU, but the cluster has 14 CPU"),
    ],
)
def test_refusals_of_the_cluster(engine_pool, tmp_path, arguments: dict[str, Any], message: str):
    """What was reserved is free again."""
    engine_pool.make_room(1)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "llama", "vocab_size": 100} | heads))
    common = {"load_format": "dummy", "max_model_len": 128, "block_size": 8, "device": "cpu", "progress": False}
    with pytest.raises(UsageError, match=message) as refused:
        LLM(str(tmp_path), skip_tokenizer_init=True, **common, **arguments)
    assert "\n" not in str(refused.value)
    free = engine_pool.num_free_cpus
    eventually(lambda: ray.available_resources().get("CPU", 0) == free, seconds=10, what="the CPUs")


def test_damaged_weights(engine_pool, model_paths, tmp_path):
    """Found by a shard, told by the constructor."""
    engine_pool.make_room(2)
    for file in model_paths["llama"].iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(UsageError, match="safetensors is damaged") as refused:
        LLM(str(tmp_path), device="cpu", tensor_parallel_size=2, skip_tokenizer_init=True, progress=False)
    assert "\n" not in str(refused.value)
    free = engine_pool.num_free_cpus
    eventually(lambda: ray.available_resources().get("CPU", 0) == free, seconds=10, what="the CPUs")


# AsyncLLM


def test_construction_only_checks_arguments():
    with pytest.raises(UsageError, match="did you mean max_model_len"):
        AsyncLLM("nowhere/at/all", max_modellen=5)
    llm = AsyncLLM("nowhere/at/all")
    with pytest.raises(UsageError, match="has not been started: use `async with"):
        llm.generate([1])
    with pytest.raises(UsageError, match="no model at"):
        llm.start()
    llm.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def async_llm(engine_pool, model_paths) -> AsyncIterator[AsyncLLM]:
    engine_pool.make_room(1)
    arguments = WHOLE | {"device": "cpu", "skip_tokenizer_init": True, "progress": False}
    async with AsyncLLM(str(model_paths["qwen3"]), **arguments) as llm:
        yield llm
    with pytest.raises(EngineDeadError, match="closed"):
        await collect(llm, [1])


async def collect(llm: AsyncLLM, prompt: list[int], max_tokens: int = 40) -> list[Increment]:
    return [increment async for increment in llm.generate(prompt, greedy(max_tokens))]


def is_idle(llm: AsyncLLM) -> bool:
    stats = llm.engine.stats()
    return (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, llm.engine.info.num_blocks)


@pytest.mark.asyncio(loop_scope="module")
async def test_concurrent_streams(async_llm: AsyncLLM, reference, rng):
    prompts = [[rng.randrange(199) for _ in range(rng.randint(1, 60))] for _ in range(30)]
    events: list[str] = []

    async def consume(prompt: list[int]) -> list[int]:
        output: list[int] = []
        async for increment in async_llm.generate(prompt, greedy(40)):
            events.append("last" if increment.finish_reason else "first" if not output else "more")
            output += increment.token_ids
            if rng.random() < 0.1:
                await asyncio.sleep(0.02)  # falls behind, and gets several tokens at once
        return output

    outputs = await asyncio.gather(*map(consume, prompts))
    reference("qwen3").check_greedy(prompts, outputs, 40)
    assert events[: events.index("last")].count("first") >= 16, "as many run together as there are lanes"
    assert len(events) < 30 * 40


@pytest.mark.asyncio(loop_scope="module")
async def test_leaving_and_cancelling_abort(async_llm: AsyncLLM, reference, rng):
    prompt = [rng.randrange(199) for _ in range(20)]
    stream = async_llm.generate(prompt, greedy(None))
    await anext(stream)
    assert not is_idle(async_llm)
    await stream.aclose()
    task = asyncio.create_task(collect(async_llm, prompt, max_tokens=100))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    eventually(lambda: is_idle(async_llm), seconds=5, what="the blocks")
    output = [token_id for increment in await collect(async_llm, prompt) for token_id in increment.token_ids]
    reference("qwen3").check_greedy([prompt], [output], 40)


@pytest.mark.asyncio(loop_scope="module")
async def test_cache_salt_separates(async_llm: AsyncLLM, rng):
    prompt = [rng.randrange(199) for _ in range(41)]

    async def num_cached(salt: str | None) -> int:
        [increment] = [i async for i in async_llm.generate(prompt, greedy(1), cache_salt=salt)]
        return increment.num_cached_tokens

    assert [await num_cached(salt) for salt in (None, None, "a", "a", "b", None)] == [0, 40, 0, 40, 0, 40]
