"""Offline throughput: each workload twice in one process, first with other tokens to warm up; the second counts.

    python benchmarks/offline.py --model config.json --load-format dummy --workload seed256

Prints one JSON line for each workload. Every engine argument is a flag, as for `rayllm generate`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

from workloads import WORKLOADS, Workload, make

from rayllm import LLM, SamplingParams
from rayllm.config import EngineArgs
from rayllm.options import add_arguments, from_arguments

LONG_OUTPUT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A model, or with --load-format dummy a config.json.")
    parser.add_argument("--workload", action="append", required=True, choices=WORKLOADS)
    parser.add_argument("--address", help="The address of a running Ray cluster. Without it, Ray is started here.")
    add_arguments(parser.add_argument_group("engine"), EngineArgs)
    options = parser.parse_args()
    arguments = dataclasses.asdict(from_arguments(options, EngineArgs)) | {"skip_tokenizer_init": True}
    start = time.monotonic()
    with LLM(**arguments, address=options.address) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1), use_tqdm=False)
        startup_s = time.monotonic() - start
        for name in options.workload:
            report(name, llm, options, startup_s)


def report(name: str, llm: LLM, options: argparse.Namespace, startup_s: float) -> None:
    run(llm, make(name, seed=1))
    workload = make(name, seed=0)
    seconds = run(llm, workload)
    prompt_tokens, output_tokens = sum(map(len, workload.prompts)), sum(workload.output_lens)
    prompt_rate, output_rate = prompt_tokens / seconds, output_tokens / seconds
    if name == "long":
        output_lens = [LONG_OUTPUT] * len(workload.prompts)
        seconds = run(llm, dataclasses.replace(workload, output_lens=output_lens))
        output_tokens = sum(output_lens)
        output_rate = output_tokens / seconds
    shards = llm.async_llm.engine.shard_stats()
    line = {
        "workload": name,
        "model": options.model,
        "tensor_parallel_size": options.tensor_parallel_size,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "seconds": round(seconds, 3),
        "output_tokens_per_s": round(output_rate, 1),
        "prompt_tokens_per_s": round(prompt_rate, 1),
        "startup_s": round(startup_s, 1),
        "peak_memory_gib": round(max(shard.peak_memory_bytes for shard in shards) / 2**30, 2),
    }
    print(json.dumps(line), flush=True)


def run(llm: LLM, workload: Workload) -> float:
    """Seconds from the first request's submission to the last token."""
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in workload.output_lens]
    start = time.monotonic()
    results = llm.generate(workload.prompts, params, use_tqdm=False)
    seconds = time.monotonic() - start
    assert [len(result["token_ids"]) for result in results] == workload.output_lens
    return seconds


if __name__ == "__main__":
    main()
