"""Greedy output in float32 equals transformers' token for token, however the engine is set up."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engine_testing import SMOLLM2, TIGHT, WHOLE, greedy, stats_of, tokens_of

TEXTS = [
    "A",
    "Hello",
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 5, 8, 13,",
    "Die Hauptstadt von Österreich heißt",
    "日本の首都は",
    "😀 Emojis are",
    "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\nThe slings and arrows of",
    "The quick brown fox jumps over the lazy dog. " * 7,
    "<html>\n<head>\n<title>",
    "Q: Why is the sky blue?\nA:",
]
CHATS = [
    "Hi!",
    "What is gravity? Answer in one sentence.",
    "Write a haiku about autumn.",
    "List three prime numbers.",
    "Translate 'good morning' into Spanish.",
    "Summarise: " + "Ray places the processes, NCCL moves the tensors, Serve takes the requests. " * 3,
    "How do I boil an egg?",
]
PROMPTS = [*TEXTS, *([{"role": "user", "content": text}] for text in CHATS)]
UNCACHED = WHOLE | {"enable_prefix_caching": False}
LENGTH = 32
QUICKEST = ("llama-1-tight", "llama-2-tight")
"""What runs with every `make test`: the hardest setup, and engines that other tests use too."""


@pytest.mark.slow
def test_smollm2(engines, reference):
    """20 prompts of very different lengths, batched and chunked."""
    llm = engines("smollm2", **SMOLLM2)
    prompts = [llm.async_llm.client.prepare(prompt, greedy(64)) for prompt in PROMPTS]
    results = llm.generate(PROMPTS, greedy(64), use_tqdm=False)
    reference("smollm2").check_greedy(prompts, tokens_of(results), 64)
    assert {result["finish_reason"] for result in results} == {"length"}


@pytest.mark.slow
def test_smollm2_on_three_shards(engines, reference):
    """9 query heads, 3 KV heads; each shard reads its third of the file and needs a third of the weights' memory."""
    whole = engines("smollm2", **SMOLLM2)
    prompts = [whole.async_llm.client.prepare(prompt, greedy(24)) for prompt in PROMPTS[2::4]]
    whole.generate(PROMPTS[2::4], greedy(24), use_tqdm=False)  # its memory is compared after the same work
    [alone] = whole.async_llm.engine.shard_stats()
    split = engines("smollm2", 3, **SMOLLM2)
    results = split.generate(PROMPTS[2::4], greedy(24), use_tqdm=False)
    reference("smollm2").check_greedy(prompts, tokens_of(results), 24)

    ranks = split.async_llm.engine.shard_stats()
    assert sum(rank.bytes_read for rank in ranks) == pytest.approx(alone.bytes_read, rel=0.01)
    weights = 134_515_008 * 4  # parameters in float32
    for rank in ranks:
        assert rank.bytes_read == pytest.approx(alone.bytes_read / 3, rel=0.02)
        assert rank.peak_memory_bytes < alone.peak_memory_bytes - 0.95 * weights * 2 / 3


def make_prompts(rng: random.Random) -> list[list[int]]:
    """Around the borders of blocks and chunks; four begin alike and two are the same."""

    def tokens(length: int) -> list[int]:
        return [rng.randrange(199) for _ in range(length)]

    stem = tokens(24)
    prompts = [tokens(length) for length in (1, 2, 3, 4, 5, 8, 9, 16, 33, rng.randint(50, 80))]
    prompts += [stem + tokens(length) for length in (1, 7, rng.randint(8, 30), 4)]
    rng.shuffle(prompts)
    return [*prompts, prompts[0]]


@pytest.mark.parametrize(
    ("name", "tensor_parallel_size", "config"),
    [
        pytest.param(
            *(name, size, config),
            id=f"{name}-{size}-{kind}",
            marks=[] if f"{name}-{size}-{kind}" in QUICKEST else [pytest.mark.slow],
        )
        for size in (1, 2)
        for name in ("llama", "qwen2", "qwen3")
        for kind, config in (("uncached", UNCACHED), ("tight", TIGHT))
        if kind == "tight" or size == 1 or name == "llama"
    ],
)
def test_tiny_models(engines, reference, rng, name: str, tensor_parallel_size: int, config: dict[str, Any]):
    llm = engines(name, tensor_parallel_size, **config)
    prompts = make_prompts(rng)
    num_preemptions = stats_of(llm).num_preemptions
    results = llm.generate(prompts, greedy(LENGTH), use_tqdm=False)
    reference(name).check_greedy(prompts, tokens_of(results), LENGTH)
    if config is TIGHT:
        assert stats_of(llm).num_preemptions > num_preemptions
    else:
        assert stats_of(llm).num_preemptions == 0
        assert {result["num_cached_tokens"] for result in results} == {0}

    for prompt in prompts[:1] * 2:  # alone
        results = llm.generate([prompt], greedy(LENGTH), use_tqdm=False)
        reference(name).check_greedy([prompt], tokens_of(results), LENGTH)
    if config is TIGHT:
        assert results[0]["num_cached_tokens"] == (len(prompts[0]) - 1) // 4 * 4


@pytest.mark.parametrize("tensor_parallel_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_prefix_caching(engines, reference, rng, tensor_parallel_size: int):
    """Hits among prompts of one batch, on finished prompts, and on their output."""
    llm = engines("llama", tensor_parallel_size, **WHOLE)
    stem, *tails = ([rng.randrange(199) for _ in range(n)] for n in (24, 1, 9, 20))
    prompts = [stem + tail for tail in tails]

    first = llm.generate(prompts, greedy(LENGTH), use_tqdm=False)
    reference("llama").check_greedy(prompts, tokens_of(first), LENGTH)
    assert [result["num_cached_tokens"] for result in first] == [0, 24, 24]

    again = llm.generate(prompts, greedy(LENGTH), use_tqdm=False)
    reference("llama").check_greedy(prompts, tokens_of(again), LENGTH)
    assert [result["num_cached_tokens"] for result in again] == [24, 32, 40]

    longer = [prompt + output[:17] for prompt, output in zip(prompts, tokens_of(first), strict=True)]
    results = llm.generate(longer, greedy(16), use_tqdm=False)
    reference("llama").check_greedy(longer, tokens_of(results), 16)
    assert [result["num_cached_tokens"] for result in results] == [40, 48, 56]


@pytest.mark.parametrize("config", [WHOLE, TIGHT], ids=["whole", "tight"])
def test_up_to_the_end_of_the_context(engines, reference, rng, config: dict[str, Any]):
    llm = engines("llama", 1, **config)
    prompts = [[rng.randrange(199) for _ in range(length)] for length in (127, 100)]
    results = llm.generate(prompts, greedy(None), use_tqdm=False)
    for prompt, result in zip(prompts, results, strict=True):
        assert len(result["token_ids"]) == 128 - len(prompt)
        assert result["finish_reason"] == "length"
        reference("llama").check_greedy([prompt], [result["token_ids"]], 128 - len(prompt))
