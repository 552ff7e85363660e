"""Transformers as the reference of engines, and what tests ask of engines."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from rayllm import LLM, SamplingParams
from rayllm.engine.driver import EngineStats

SMOLLM2 = {"max_model_len": 320, "block_size": 16, "max_num_seqs": 20, "max_num_batched_tokens": 64}
WHOLE = {"max_model_len": 128, "block_size": 8, "max_num_seqs": 16, "max_num_batched_tokens": 1024}
# 34 blocks hold one sequence of 128 tokens, but not many of the 7 that may run; a chunk is what 8 tokens a step leave
TIGHT = WHOLE | {"block_size": 4, "num_gpu_blocks_override": 34, "max_num_seqs": 7, "max_num_batched_tokens": 8}
"""What engines are most often made with, so that tests share them."""

NEAR_TIE = 1e-4
"""Logits closer than this may change order with the order of summation."""


class Reference:
    """A model as transformers runs it, in float32."""

    def __init__(self, folder: Path):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[tokens, vocabulary] float64."""
        return self.model(torch.tensor([token_ids])).logits[0].double()

    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        return self.logits(token_ids).log_softmax(dim=1)

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """What `generate(do_sample=False)` adds to the prompt."""
        output = self.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0)
        token_ids: list[int] = output[0, len(prompt) :].tolist()
        return token_ids

    def check_greedy(self, prompts: list[list[int]], outputs: list[list[int]], max_tokens: int) -> None:
        """Raises AssertionError unless `outputs` are the greedy ones, token for token.

        One forward pass tells: every token's logit is the largest, or within `NEAR_TIE` of it.
        """
        for prompt, output in zip(prompts, outputs, strict=True):
            assert len(output) == max_tokens
            logits = self.logits([*prompt, *output])[len(prompt) - 1 : -1]
            gaps = logits.amax(dim=1) - logits.gather(1, torch.tensor(output)[:, None])[:, 0]
            assert gaps.max() < NEAR_TIE, f"{output} is not greedy: gaps {gaps.tolist()}, prompt {prompt}"


def stats_of(llm: LLM) -> EngineStats:
    return llm.async_llm.engine.stats()


def assert_idle(llm: LLM) -> None:
    """Within a moment nothing runs, waits or is in flight, and every block is free."""
    eventually(lambda: _is_idle(llm), seconds=10, what="the engine to be idle")


def _is_idle(llm: LLM) -> bool:
    stats = stats_of(llm)
    busy = stats.num_running, stats.num_waiting, stats.num_in_flight
    return busy == (0, 0, 0) and stats.num_free_blocks == llm.async_llm.engine.info.num_blocks


def eventually(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits for `condition`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def pids_of(llm: LLM) -> list[int]:
    """The driver's, then the shards'."""
    engine = llm.async_llm.engine
    return [engine.stats().pid, *(shard.pid for shard in engine.shard_stats())]


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    """Deterministic, and `max_tokens` long whatever comes."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **params)


def tokens_of(results: list[dict[str, Any]]) -> list[list[int]]:
    return [result["token_ids"] for result in results]
