"""Prefix-cache hits and shares of the load: several engines with the router on, then off, then one that sees all.

    python benchmarks/routing.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --max-model-len 1024

Two workloads each, a fixed number of requests in flight: `prefixes`, each of `--prefixes` random ones in every round,
in random order, and `hot`, where four of five requests have the same. Prints one JSON line for each of the six runs,
whose requests are the same. Every argument of the engine and of a served model is a flag, as for `rayllm serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import time
from collections import Counter
from typing import Any

import ray
from ray import serve

from deployments.config import ServedModel
from deployments.openai_api import build
from rayllm.engine import placement
from rayllm.options import add_arguments, from_arguments

APP = "routing"
OWN_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prefixes", type=int, default=20, help="Number of prefixes (20).")
    parser.add_argument("--prefix-len", type=int, default=256, help="Tokens of each prefix (256).")
    parser.add_argument("--rounds", type=int, default=6, help="How often each prefix comes (6).")
    parser.add_argument("--concurrency", type=int, default=16, help="Requests in flight (16).")
    parser.add_argument("--output-len", type=int, default=8, help="Output tokens of each request (8).")
    add_arguments(parser.add_argument_group("model"), ServedModel)
    parser.set_defaults(num_replicas=2)
    options = parser.parse_args()
    model = from_arguments(options, ServedModel)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    started_ray = placement.connect(None, min_cpus=model.num_replicas * model.tensor_parallel_size)
    try:
        for name, changes in (
            ("on", {"prefix_routing": True}),
            ("off", {"prefix_routing": False}),
            ("one engine", {"num_replicas": 1}),
        ):
            arguments = {field: getattr(model, field) for field in ServedModel.names()} | changes
            serve.run(build(arguments), name=APP, route_prefix=None)
            for workload, prompts in workloads(options).items():
                print(json.dumps({"router": name, "workload": workload} | measure(options, prompts)), flush=True)
            serve.delete(APP)
    finally:
        if started_ray:
            ray.shutdown()


def workloads(options: argparse.Namespace) -> dict[str, list[list[int]]]:
    rng = random.Random(options.seed)

    def tokens(number: int) -> list[int]:
        return [rng.randint(100, 10000) for _ in range(number)]

    def requests(prefixes: list[list[int]]) -> list[list[int]]:
        return [prefix + tokens(OWN_TOKENS) for prefix in prefixes]

    prefixes = [tokens(options.prefix_len) for _ in range(options.prefixes)]
    rounds = [rng.sample(prefixes, len(prefixes)) for _ in range(options.rounds)]
    hot = tokens(options.prefix_len)
    mixed = [tokens(options.prefix_len) if i % 5 == 4 else hot for i in range(options.prefixes * options.rounds)]
    return {"prefixes": requests([prefix for each in rounds for prefix in each]), "hot": requests(mixed)}


def measure(options: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    before = sequences()
    start = time.monotonic()
    results = asyncio.run(ask(options, prompts))
    seconds = time.monotonic() - start
    after = sequences()
    risen = after - before
    cached = sum(result["num_cached_tokens"] for result in results)
    return {
        "requests": len(prompts),
        "hit_rate": round(cached / sum(map(len, prompts)), 3),
        "load_shares": sorted((round(risen[engine] / len(prompts), 3) for engine in after), reverse=True),
        "seconds": round(seconds, 2),
    }


def sequences() -> Counter[str]:
    """How many each engine has been given so far."""
    response: Any = serve.get_deployment_handle("Engine", APP).broadcast("status")
    return Counter({status.engine: status.stats.num_sequences for status in response.results()})


async def ask(options: argparse.Namespace, prompts: list[list[int]]) -> list[dict[str, Any]]:
    service: Any = serve.get_app_handle(APP)
    free = asyncio.Semaphore(options.concurrency)

    async def one(prompt: list[int]) -> dict[str, Any]:
        async with free:
            result: dict[str, Any] = await service.generate.remote(
                prompt, max_tokens=options.output_len, ignore_eos=True
            )
            return result

    return list(await asyncio.gather(*map(one, prompts)))


if __name__ == "__main__":
    main()
