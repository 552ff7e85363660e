"""What is sampled and what is said of it, against distributions computed in float64 from transformers' logits."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from engine_testing import NEAR_TIE, TIGHT, WHOLE, Reference, greedy, stats_of, tokens_of

from rayllm import LLM, SamplingParams, UsageError
from rayllm.messages.step import Logprobs

VOCABULARY = 199
SETUPS = pytest.mark.parametrize(
    ("tensor_parallel_size", "config"), [(1, WHOLE), (1, TIGHT), (2, WHOLE)], ids=["whole", "tight", "split"]
)


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(length)]


def processed(
    logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int], banned: list[int]
) -> np.ndarray:
    """Logits after logit_bias, min_tokens and penalties, each as its definition says."""
    logits = logits.copy()
    for token_id, value in (params.logit_bias or {}).items():
        logits[token_id] += value
    if len(output) < params.min_tokens:
        logits[banned] = -math.inf
    for token_id in {*prompt, *output}:
        factor = params.repetition_penalty
        logits[token_id] *= 1 / factor if logits[token_id] > 0 else factor
    for token_id, count in Counter(output).items():
        logits[token_id] -= params.presence_penalty + count * params.frequency_penalty
    return logits


def distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, min_p, top_k and top_p, in this order."""
    probs = np.exp((logits - logits.max()) / params.temperature)
    probs[probs < params.min_p * probs.max()] = 0
    order = np.argsort(-probs, kind="stable")
    if params.top_k > 0:
        probs[order[params.top_k :]] = 0
    probs /= probs.sum()
    kept = np.searchsorted(np.cumsum(probs[order]), params.top_p) + 1  # the fewest that reach top_p
    if params.top_p < 1:
        probs[order[kept:]] = 0
    return probs / probs.sum()


# Random sampling


def assert_sampled_from(probs: np.ndarray, samples: list[int]) -> None:
    """The support is exact and the counts are likely (Pearson's χ², quantile by Wilson and Hilferty 1931)."""
    counts, expected = np.bincount(samples, minlength=len(probs)), len(samples) * probs
    assert not counts[probs == 0].any(), "a token that was filtered out"
    assert counts[expected > 30].all(), "a token that never comes"
    is_rare = expected < 8
    counts = np.append(counts[~is_rare], counts[is_rare].sum())
    expected = np.append(expected[~is_rare], expected[is_rare].sum())
    cells = expected > 0
    statistic = ((counts - expected)[cells] ** 2 / expected[cells]).sum()
    freedom = max(1, cells.sum() - 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 5 * math.sqrt(2 / (9 * freedom))) ** 3  # 5 σ
    assert statistic < limit, f"χ² is {statistic}"


DISTRIBUTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.0},
    {"temperature": 0.4},
    {"top_k": 7, "temperature": 1.5},
    {"top_k": 1},
    {"top_p": 0.8},
    {"top_p": 1e-6},
    {"min_p": 0.1, "temperature": 2.0},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    {"logit_bias": {3: 4.0, 50: -100.0, 198: 3.5}},
    {"repetition_penalty": 1.5, "temperature": 1.5},
]


@pytest.mark.parametrize(("tensor_parallel_size", "repeats"), [(1, 3), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_distributions(engines, reference, rng, tensor_parallel_size: int, repeats: int):
    """All in one batch, so that no row gets another's parameters."""
    llm = engines("llama", tensor_parallel_size, **WHOLE)
    prompts, params = [], []
    for given in DISTRIBUTIONS:
        prompt = random_prompt(rng, 12)
        logits = reference("llama").logits(prompt)[-1].numpy()
        while (
            len(set(distribution(logits * f, SamplingParams(**given)).nonzero()[0].size for f in (0.9999, 1.0001))) > 1
        ):
            prompt = random_prompt(rng, 12)  # rounding might move the border of the support
            logits = reference("llama").logits(prompt)[-1].numpy()
        for _ in range(repeats):
            prompts.append(prompt)
            params.append(SamplingParams(n=128, max_tokens=1, seed=rng.getrandbits(60), **given))
    order = list(range(len(prompts)))
    rng.shuffle(order)
    results = llm.generate([prompts[i] for i in order], [params[i] for i in order], use_tqdm=False)
    samples: dict[int, list[int]] = {}
    for i, result in zip(order, results, strict=True):
        samples.setdefault(i // repeats, []).extend(choice["token_ids"][0] for choice in result["choices"])
    for i in range(len(DISTRIBUTIONS)):
        prompt = prompts[repeats * i]
        logits = reference("llama").logits(prompt)[-1].numpy()
        own = params[repeats * i]
        assert len(samples[i]) == repeats * 128
        assert_sampled_from(distribution(processed(logits, own, prompt, [], []), own), samples[i])


def test_consecutive_tokens_are_independent(engines, reference, rng):
    """The second token's distribution, whatever the first was: noise is not used twice."""
    llm = engines("llama", 1, **WHOLE)
    prompt = random_prompt(rng, 5)
    bias = {i: 100.0 for i in range(8)}  # eight tokens are left, about equally likely
    params = SamplingParams(n=128, max_tokens=2, temperature=5, logit_bias=bias)
    results = llm.generate([prompt] * 12, params, use_tqdm=False)
    pairs = [choice["token_ids"] for result in results for choice in result["choices"]]
    logits = [
        processed(reference("llama").logits([*prompt, *first])[-1].numpy(), params, [], [], [])
        for first in ([], *([i] for i in range(8)))
    ]
    first = distribution(logits[0], params)
    joint = np.concatenate([first[i] * distribution(logits[1 + i], params)[:8] for i in range(8)])
    assert_sampled_from(joint / joint.sum(), [8 * a + b for a, b in pairs])


def test_seeds(engines, rng):
    """Same seed, same output: alone, in a batch, preempted, on two shards."""
    prompts = [random_prompt(rng, rng.randint(1, 40)) for _ in range(14)]
    params = [
        SamplingParams(
            seed=rng.randrange(-(2**63), 2**63),
            max_tokens=40,
            temperature=rng.choice([0.7, 1.5]),
            top_p=rng.choice([1, 0.9]),
            top_k=rng.choice([0, 3, 20]),
            presence_penalty=rng.choice([0, 0.5]),
        )
        for _ in prompts
    ]
    whole = engines("llama", 1, **WHOLE)
    expected = tokens_of(whole.generate(prompts, params, use_tqdm=False))
    for i in range(4):
        assert tokens_of(whole.generate([prompts[i]], params[i], use_tqdm=False)) == [expected[i]]

    tight = engines("llama", 1, **TIGHT)
    num_preemptions = stats_of(tight).num_preemptions
    assert tokens_of(tight.generate(prompts, params, use_tqdm=False)) == expected
    assert stats_of(tight).num_preemptions > num_preemptions

    split = engines("llama", 2, **WHOLE)
    assert tokens_of(split.generate(prompts, params, use_tqdm=False)) == expected


def test_requests_without_a_seed_differ(engines, rng):
    llm = engines("llama", 1, **WHOLE)
    prompt = random_prompt(rng, 3)
    outputs = tokens_of(llm.generate([prompt] * 8, SamplingParams(max_tokens=20, temperature=2), use_tqdm=False))
    assert len(set(map(tuple, outputs))) == 8


@pytest.mark.parametrize("seed", [5, 2**63 - 2])
def test_choices_use_the_seeds_that_follow(engines, rng, seed: int):
    llm = engines("llama", 1, **WHOLE)
    prompt = random_prompt(rng, 20)

    def params(seed: int, n: int = 1) -> SamplingParams:
        return SamplingParams(n=n, seed=(seed + 2**63) % 2**64 - 2**63, max_tokens=20, temperature=1.5)

    [result] = llm.generate([prompt], params(seed, n=4), use_tqdm=False)
    alone = llm.generate([prompt] * 4, [params(seed + i) for i in range(4)], use_tqdm=False)
    assert tokens_of(result["choices"]) == tokens_of(alone)
    assert result["token_ids"] == alone[0]["token_ids"]
    assert len(set(map(tuple, tokens_of(alone)))) == 4


# Processed logits


def check(reference: Reference, prompt: list[int], result: dict[str, Any], params: SamplingParams) -> None:
    """Every token of a greedy output is the likeliest after processing."""
    output = result["token_ids"]
    logits = reference.logits(prompt + output)[len(prompt) - 1 :].numpy()
    for i, token_id in enumerate(output):
        own = processed(logits[i], params, prompt, output[:i], params.stop_token_ids)
        assert own.max() - own[token_id] < NEAR_TIE, f"token {i} of {params}"
        is_stop = token_id in params.stop_token_ids and i + 1 >= params.min_tokens
        assert is_stop == (i + 1 == len(output) and result["finish_reason"] == "stop")


@SETUPS
def test_processing(engines, reference, rng, tensor_parallel_size: int, config: dict[str, Any]):
    """Each parameter alone and all together, in one batch."""
    llm = engines("llama", tensor_parallel_size, **config)
    num_preemptions = stats_of(llm).num_preemptions
    bias = {token_id: rng.uniform(-8, 8) for token_id in rng.sample(range(VOCABULARY), 40)}
    stops = rng.sample(range(VOCABULARY), 60)
    kinds: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"presence_penalty": -1, "frequency_penalty": -0.5},
        {"logit_bias": bias},
        {"stop_token_ids": stops},
        {"stop_token_ids": stops, "min_tokens": 7},
        {"stop_token_ids": stops, "min_tokens": 1, "logit_bias": dict.fromkeys(stops, 9.0)},
        {
            "repetition_penalty": 1.2,
            "presence_penalty": 0.3,
            "frequency_penalty": 0.4,
            "logit_bias": bias,
            "stop_token_ids": stops,
            "min_tokens": 20,
        },
    ]
    params = [greedy(32, **kind) for kind in kinds * 2]
    prompts = [random_prompt(rng, rng.randint(1, 50)) for _ in params]
    results = llm.generate(prompts, params, use_tqdm=False)
    for prompt, result, own in zip(prompts, results, params, strict=True):
        check(reference("llama"), prompt, result, own)
    plain = [i for i, own in enumerate(params) if own == greedy(32)]
    outputs = [results[i]["token_ids"] for i in plain]
    reference("llama").check_greedy([prompts[i] for i in plain], outputs, 32)
    if config is TIGHT:
        assert stats_of(llm).num_preemptions > num_preemptions


def test_a_lane_forgets_its_last_sequence(engines, reference, rng):
    """Biases of a finished sequence must not touch the next one in its lane, even beside others that have some."""
    llm = engines("llama", 1, **WHOLE)
    prompt = random_prompt(rng, 10)
    biased = greedy(4, logit_bias={7: 100.0})
    assert tokens_of(llm.generate([prompt], biased, use_tqdm=False)) == [[7] * 4]
    stream = llm.stream(prompt, greedy(30))
    output = list(next(stream).token_ids)
    assert tokens_of(llm.generate([prompt], greedy(4, logit_bias={8: 100.0}), use_tqdm=False)) == [[8] * 4]
    for increment in stream:
        output += increment.token_ids
    reference("llama").check_greedy([prompt], [output], 30)


# Log-probabilities


def check_logprobs(expected: np.ndarray, token_id: int, entry: dict[int, float], k: int) -> None:
    """`expected` [vocabulary]: the log-probabilities of this position."""
    token_ids, values = list(entry), np.array(list(entry.values()))
    assert token_ids[0] == token_id, "the token itself comes first"
    np.testing.assert_allclose(values, expected[token_ids], rtol=0, atol=NEAR_TIE)
    likeliest = np.sort(expected)[::-1][:k]
    assert len(entry) in (k, k + 1)
    others = values if len(entry) == k else values[1:]  # is the token itself one of the likeliest?
    np.testing.assert_allclose(np.sort(others)[::-1], likeliest, rtol=0, atol=NEAR_TIE)


@SETUPS
def test_logprobs(engines, reference, rng, tensor_parallel_size: int, config: dict[str, Any]):
    """They are those of raw logits, whatever the sampling; of chunked prompts, and beside requests that want none."""
    llm = engines("llama", tensor_parallel_size, **config)
    wanted = [(5, 3), (None, None), (0, None), (None, 0), (2, 20), (1, None), (None, 4)] * 2
    prompts = [random_prompt(rng, rng.randint(2, 60)) for _ in wanted]
    prompts[0] = prompts[0][:1]
    params = [
        SamplingParams(
            temperature=rng.choice([0, 1.5]), top_k=10, presence_penalty=1, max_tokens=20, logprobs=k, prompt_logprobs=p
        )
        for k, p in wanted
    ]
    llm.generate(prompts[:3], greedy(1), use_tqdm=False)  # fills the prefix cache: prompt_logprobs must not hit it
    results = llm.generate(prompts, params, use_tqdm=False)
    for prompt, result, (k, p) in zip(prompts, results, wanted, strict=True):
        output = result["token_ids"]
        expected = reference("llama").logprobs(prompt + output).numpy()
        assert ("logprobs" in result, "prompt_logprobs" in result) == (k is not None, p is not None)
        if k is not None:
            assert len(result["logprobs"]) == len(output)
            for i, entry in enumerate(result["logprobs"]):
                check_logprobs(expected[len(prompt) + i - 1], output[i], entry, k)
        if p is not None:
            assert result["num_cached_tokens"] == 0
            assert len(result["prompt_logprobs"]) == len(prompt)
            assert result["prompt_logprobs"][0] is None
            for i, entry in enumerate(result["prompt_logprobs"][1:], start=1):
                check_logprobs(expected[i - 1], prompt[i], entry, p)


def test_ranks(engines, reference, rng):
    llm = engines("llama", 1, **WHOLE)
    prompt = random_prompt(rng, 30)
    output: list[int] = []
    entries: list[Logprobs] = []
    prompt_entries: list[Logprobs] = []
    params = SamplingParams(temperature=5, max_tokens=30, logprobs=0, prompt_logprobs=0)
    for increment in llm.stream(prompt, params):
        output += increment.token_ids
        entries += increment.logprobs
        prompt_entries += increment.prompt_logprobs
    expected = reference("llama").logprobs(prompt + output).numpy()
    for position, entry in enumerate([*prompt_entries, *entries]):
        token_id = (prompt + output)[position + 1]
        own = expected[position, token_id]
        assert (expected[position] > own + NEAR_TIE).sum() < entry.rank <= (expected[position] > own - NEAR_TIE).sum()
    assert len({entry.rank for entry in entries}) > 10


# What a request cannot ask


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([5, 199], {}, "token ids must be 0 to 198"),
        ([5, -1], {}, "token ids must be 0 to 198"),
        ([5] * 128, {}, "this model's maximum context length is 128 tokens, but the prompt has 128: 127 leave room"),
        ([5], {"logit_bias": {199: 1.0}}, "token ids in logit_bias must be 0 to 198"),
        ([5], {"stop_token_ids": [199]}, "token ids in stop_token_ids must be 0 to 198"),
        ([5], {"stop": "a"}, "stop strings need the tokenizer"),
        ("text", {}, "only token ids can be prompts"),
        ([{"role": "user", "content": "a"}], {}, "only token ids can be prompts"),
    ],
)
def test_refusals(engines, prompt: Any, params: dict[str, Any], message: str):
    """Before any prompt of the call is computed."""
    llm: LLM = engines("llama", 1, **WHOLE)
    num_steps = stats_of(llm).num_steps
    with pytest.raises(UsageError, match=message) as refused:
        llm.generate([[1, 2, 3], prompt], [SamplingParams(), SamplingParams(**params)], use_tqdm=False)
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match=message):
        list(llm.stream(prompt, SamplingParams(**params)))
    assert stats_of(llm).num_steps == num_steps
