"""rayllm beside transformers on a CPU, in one run: the same model, prompts and number of output tokens.

    python benchmarks/cpu.py .cache/SmolLM2-135M-Instruct.Q4_1.gguf

Prints one JSON line: output tokens/s of each, and the ratios. Rounds alternate; the best of each counts.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rayllm import LLM, SamplingParams

NUM_REQUESTS, PROMPT_LEN, OUTPUT_LEN = 8, 128, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="A .gguf file.")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        options.model.parent, gguf_file=options.model.name, dtype=torch.float32
    )

    def transformers(prompts: list[list[int]]) -> None:
        ids = torch.tensor(prompts)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT_LEN,
            min_new_tokens=OUTPUT_LEN,
            do_sample=False,
        )
        assert output.shape[1] == PROMPT_LEN + OUTPUT_LEN

    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=OUTPUT_LEN)
    with LLM(str(options.model), enable_prefix_caching=False) as llm:

        def rayllm(prompts: list[list[int]]) -> None:
            llm.generate(prompts, params, use_tqdm=False)

        ways: dict[str, tuple[int, Callable[[list[list[int]]], None]]] = {
            "rayllm_batch": (NUM_REQUESTS, rayllm),
            "rayllm_one": (1, rayllm),
            "transformers_padded_batch": (NUM_REQUESTS, transformers),
            "transformers_one": (1, transformers),
        }
        rates = dict.fromkeys(ways, 0.0)
        for _ in range(options.rounds):
            for name, (num_requests, way) in ways.items():
                prompts = [[random.randrange(1000, 20000) for _ in range(PROMPT_LEN)] for _ in range(num_requests)]
                start = time.perf_counter()
                way(prompts)
                rates[name] = max(rates[name], num_requests * OUTPUT_LEN / (time.perf_counter() - start))
    line = {name: round(rate, 1) for name, rate in rates.items()} | {
        "batch_vs_one_by_one": round(rates["rayllm_batch"] / rates["transformers_one"], 2),
        "batch_vs_padded_batch": round(rates["rayllm_batch"] / rates["transformers_padded_batch"], 2),
        "one_vs_one": round(rates["rayllm_one"] / rates["transformers_one"], 2),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
