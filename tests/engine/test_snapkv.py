"""SnapKV against an implementation from its definition: transformers in float64, one sequence at a time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_testing import greedy, stats_of, tokens_of
from pruned_reference import PrunedReference

from rayllm import LLM, SamplingParams, UsageError
from rayllm.checkpoint.sources import resolve_model
from rayllm.config import EngineArgs
from rayllm.messages.base import pack_ids
from rayllm.messages.step import LaneStart, Prune, StepInput
from rayllm.models.parallel import TensorParallel
from rayllm.runner import pruning
from rayllm.runner.device import open_device
from rayllm.runner.executor import Executor
from rayllm.runner.loading import load_model

WINDOW = 8
PRUNING: dict[str, Any] = {"enable_snapkv": True, "snapkv_limit": 24, "snapkv_attn_sample_queries": WINDOW}
WHOLE = PRUNING | {"max_model_len": 192, "block_size": 8, "max_num_seqs": 16, "max_num_batched_tokens": 1024}
CHUNKED = WHOLE | {"max_num_batched_tokens": 24}
# room for a prompt, what it keeps and says, and little more
TIGHT = CHUNKED | {"block_size": 4, "num_gpu_blocks_override": 40, "max_model_len": 160, "max_num_seqs": 6}
LENGTH = 24


@pytest.fixture(scope="module")
def tiny(tiny_models: dict[str, Path]) -> PrunedReference:
    return PrunedReference(tiny_models["llama"], WINDOW)


def make_prompts(rng: random.Random) -> list[list[int]]:
    """Some begin alike, two are the same, some are not longer than the limit or hardly so; of the last ones more than
    the tight cache holds to their ends begin together."""
    stem = [rng.randrange(199) for _ in range(40)]
    lengths = (1, 24, 25, 32, 33, 41, rng.randint(60, 100), rng.randint(60, 100))
    prompts = [[rng.randrange(199) for _ in range(length)] for length in lengths]
    prompts += [stem + [rng.randrange(199) for _ in range(length)] for length in (1, 9, 40)]
    rng.shuffle(prompts)
    return [*prompts, prompts[0], *([rng.randrange(199) for _ in range(24)] for _ in range(5))]


def keeps(prompt: list[int], block_size: int) -> bool:
    """Whether pruning would save no block."""
    return -(-len(prompt) // block_size) <= -(-24 // block_size)


@pytest.mark.parametrize(
    ("size", "config"),
    [
        pytest.param(1, WHOLE, id="whole"),
        pytest.param(1, CHUNKED, id="chunked"),
        pytest.param(1, TIGHT, id="tight", marks=pytest.mark.slow),  # as on two shards, but easier
        pytest.param(2, TIGHT, id="tight, two shards"),
        pytest.param(1, WHOLE | {"snapkv_policy": "streaming"}, id="streaming"),
    ],
)
def test_outputs(engines, tiny: PrunedReference, rng, size: int, config: dict[str, Any]):
    """However prompts are cut, batched, preempted, cached or split over shards: the reference's tokens."""
    llm: LLM = engines("llama", size, **config)
    prompts = make_prompts(rng)
    policy = config.get("snapkv_policy", "snapkv")
    limits = [10**9 if keeps(prompt, config["block_size"]) else 24 for prompt in prompts]
    expected = [tiny.generate(p, limit, LENGTH, policy) for p, limit in zip(prompts, limits, strict=True)]
    before = stats_of(llm)
    results = llm.generate(prompts, greedy(LENGTH), use_tqdm=False)
    assert tokens_of(results) == expected
    for prompt, limit, result in zip(prompts, limits, results, strict=True):
        assert result["num_pruned_tokens"] == max(len(prompt) - limit, 0)
    if config["block_size"] == 4:
        assert stats_of(llm).num_preemptions > before.num_preemptions
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _ in range(2):  # alone, and cached up to the window
        [result] = llm.generate([prompts[longest]], greedy(LENGTH), use_tqdm=False)
        assert result["token_ids"] == expected[longest]
    length, block_size = len(prompts[longest]), config["block_size"]
    window = 1 if policy == "streaming" else WINDOW
    assert result["num_cached_tokens"] == (length - window) // block_size * block_size


@pytest.mark.slow
def test_a_real_model(engines, smollm2_folder: Path):
    config = PRUNING | {"max_model_len": 320, "block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    llm: LLM = engines("smollm2", 1, **config)
    reference = PrunedReference(smollm2_folder, WINDOW)
    text = "Ray places the processes, NCCL moves the tensors, Serve takes the requests. "
    prompts = [llm.async_llm.client.prepare(text * n + "In short:", greedy(1)) for n in (3, 8)]
    results = llm.generate(prompts, greedy(12), use_tqdm=False)
    assert tokens_of(results) == [reference.generate(prompt, 24, 12) for prompt in prompts]


def test_limits_of_requests(engines, tiny: PrunedReference, rng):
    llm: LLM = engines("llama", 1, **WHOLE)
    prompt = [rng.randrange(199) for _ in range(90)]
    for limit, kept in ((None, 24), ("all", 90), (16, 16), (24, 24)):
        [result] = llm.generate([prompt], greedy(LENGTH, snapkv_limit=limit), use_tqdm=False)
        assert result["num_pruned_tokens"] == 90 - kept
        assert result["token_ids"] == tiny.generate(prompt, kept, LENGTH)
    for limit in (11, 25):
        with pytest.raises(UsageError, match=f"snapkv_limit must be 12 to 24, 'all' or None, not {limit}"):
            llm.generate([prompt], greedy(1, snapkv_limit=limit), use_tqdm=False)


def test_without_pruning_limits_are_refused(engines):
    llm: LLM = engines("llama", 1, max_model_len=128, block_size=8, max_num_seqs=16, max_num_batched_tokens=1024)
    with pytest.raises(UsageError, match="this engine runs without enable_snapkv"):
        llm.generate([[1]], greedy(1, snapkv_limit=20), use_tqdm=False)


def test_layers_that_are_pruned_one_at_a_time(model_paths, monkeypatch: pytest.MonkeyPatch, rng):
    """As those of long prompts are: they keep the same."""
    source = resolve_model(str(model_paths["llama"]))
    limits = {"max_model_len": 64, "max_num_seqs": 1, "max_num_batched_tokens": 64, "block_size": 8}
    config = EngineArgs.of(model="any", **PRUNING, **limits).resolve(source.config, "cpu")
    prompt = pack_ids([rng.randrange(199) for _ in range(60)])
    start = LaneStart(0, prompt, 60, [list(range(8))], SamplingParams(temperature=0), 0, [], None)
    rows = pack_ids([0, 0, 60, 1, 0, 60])
    model = load_model(config, source, TensorParallel(), open_device("cpu", [], 1))
    caches = []
    for at_once in (pruning.SCORES_AT_ONCE, 1):
        monkeypatch.setattr(pruning, "SCORES_AT_ONCE", at_once)
        executor = Executor(model, [12])
        executor.execute(StepInput(0, 1, [start], [], rows, 0, [Prune(0, 24, [[8, 9, 10]])])).wait()
        caches.append((executor.attentions[0].keys, executor.attentions[0].values))
    for one, other in zip(*caches, strict=True):
        assert torch.equal(one, other)
        assert one[:, 8:11].any(), "what is kept"


def test_leaving_while_it_prunes(engines, tiny: PrunedReference, rng):
    """Leaks nothing: the fixture sees to that."""
    llm: LLM = engines("llama", 1, **CHUNKED)
    prompts = [[rng.randrange(199) for _ in range(120)] for _ in range(8)]
    streams = [llm.stream(prompt, greedy(60)) for prompt in prompts]
    for i, stream in enumerate(streams):
        for _ in range(i % 3):
            next(stream)
        stream.close()
    [result] = llm.generate(prompts[:1], greedy(LENGTH), use_tqdm=False)
    assert result["token_ids"] == tiny.generate(prompts[0], 24, LENGTH)


def test_shards_that_share_a_head_are_refused(model_paths):
    with pytest.raises(UsageError, match="tensor_parallel_size must be at most 2 with enable_snapkv"):
        LLM(str(model_paths["llama"]), device="cpu", tensor_parallel_size=4, skip_tokenizer_init=True, **PRUNING)
