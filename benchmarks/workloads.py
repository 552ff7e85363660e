"""The workloads, as lists of token-id prompts and output lengths."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Requests that are all there at once: prompts, and how many tokens each is to be answered with."""

    prompts: list[list[int]]
    output_lens: list[int]


def _uniform(rng: random.Random, num_requests: int, prompt_len: int, output_len: int) -> Workload:
    return Workload(
        [[rng.randint(0, 10000) for _ in range(prompt_len)] for _ in range(num_requests)], [output_len] * num_requests
    )


def _seed256(rng: random.Random) -> Workload:
    """256 requests, prompt and output lengths each uniform in 100 to 1024."""
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    return Workload(prompts, [rng.randint(100, 1024) for _ in range(256)])


def _prefix(rng: random.Random) -> Workload:
    """256 requests that share 2,048 prompt tokens and have 64 of their own."""
    shared = [rng.randint(0, 10000) for _ in range(2048)]
    own = _uniform(rng, 256, 64, 64)
    return Workload([shared + prompt for prompt in own.prompts], own.output_lens)


WORKLOADS: dict[str, Callable[[random.Random], Workload]] = {
    "seed256": _seed256,
    "bs1": lambda rng: _uniform(rng, 1, 128, 256),
    "bs16": lambda rng: _uniform(rng, 16, 128, 256),
    "prefill": lambda rng: _uniform(rng, 64, 2048, 1),
    "prefix": _prefix,
    "long": lambda rng: _uniform(rng, 16, 32000, 1),  # and once more, now cached, with 512 output tokens
}


def make(name: str, seed: int) -> Workload:
    """The workload of that name; other seeds give other tokens and, for seed256, other lengths."""
    return WORKLOADS[name](random.Random(seed))
