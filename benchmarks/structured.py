"""JSON schemas and their instances against the masks of structured output, and answers of a model that writes nonsense.

    python benchmarks/structured.py SAMPLE.jsonl --tokenizer .cache/SmolLM2-135M-Instruct.Q4_1.gguf

SAMPLE.jsonl has a JSON object a line with `schema`, `valid` and `invalid` (lists of instances), as JSONSchemaBench
(arXiv:2501.10868) does. A schema is refused with its reason, or it is served: then each valid instance should pass the
masks token by token, each invalid one be stopped, and answers that end by themselves keep to the schema. Prints a JSON
line; `--verbose` names what is wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import numpy as np

from rayllm import LLM, SamplingParams, UsageError
from rayllm.frontend.grammar import grammar_of
from rayllm.frontend.tokenizer import Tokenizer
from rayllm.sampling_params import StructuredOutputs

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sample", type=Path)
    parser.add_argument("--tokenizer", required=True, help="A model folder or a .gguf file.")
    parser.add_argument("--answers", type=int, default=3, help="Answers for each schema; 0 starts no engine.")
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    cases = [json.loads(line) for line in options.sample.read_text().splitlines()]
    tokenizer = Tokenizer.from_source(options.tokenizer)
    guide = llguidance.LLTokenizer(tokenizer.backend.to_str(), eos_token=list(tokenizer.eos_token_ids))

    served, refused, compile_s = [], Counter[str](), []
    for case in cases:
        began = time.perf_counter()
        try:
            case["grammar"] = grammar_of(StructuredOutputs(json=case["schema"]))
            served.append(case)
        except UsageError as error:
            refused[str(error).removeprefix("structured_outputs cannot be served: ")] += 1
        compile_s.append(time.perf_counter() - began)
    mask_s: list[float] = []
    wrong = [problem for case in served for problem in _wrong_instances(case, guide, mask_s)]
    line: dict[str, Any] = {
        "schemas": len(cases),
        "served": len(served),
        "refused": dict(refused.most_common()),
        "wrong_instances": len(wrong),
        "compile_ms": _percentiles(compile_s),
        "mask_us": _percentiles(mask_s, 1e6),
        "vocabulary": guide.vocab_size,
    }
    if options.answers:
        ended, invalid = _answers(served, options)
        line |= {"answers": len(served) * options.answers, "ended": ended, "invalid_answers": len(invalid)}
        wrong += invalid
    print(json.dumps(line))
    if options.verbose:
        print("\n".join(wrong))


def _wrong_instances(case: dict[str, Any], guide: llguidance.LLTokenizer, mask_s: list[float]) -> list[str]:
    """What is wrong with the masks of one schema; times each mask."""
    wrong = []
    mask = np.zeros(-(-guide.vocab_size // 32), np.int32)
    for kind in ("valid", "invalid"):
        for instance in case[kind]:
            matcher = llguidance.LLMatcher(guide, case["grammar"], log_level=0)
            passes = True
            for token_id in [*guide.tokenize_str(json.dumps(instance, ensure_ascii=False)), guide.eos_token]:
                began = time.perf_counter()
                matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                mask_s.append(time.perf_counter() - began)
                passes = not matcher.is_error() and bool(mask[token_id // 32] >> (token_id % 32) & 1)
                if not passes or not matcher.consume_token(token_id):
                    break
            if passes != (kind == "valid"):
                wrong.append(f"{case['name']}: a {kind} instance {'passes' if passes else 'is stopped'}: {instance}")
    return wrong


def _answers(served: list[dict[str, Any]], options: argparse.Namespace) -> tuple[int, list[str]]:
    """(answers that ended by themselves, those of them that do not keep to their schema)."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        vocab_size = Tokenizer.from_source(options.tokenizer).vocab_size
        config.write_text(json.dumps(TINY | {"vocab_size": vocab_size, "eos_token_id": 2}))
        with LLM(str(config), load_format="dummy", tokenizer=options.tokenizer, max_num_seqs=64) as llm:
            params = [
                SamplingParams(
                    structured_outputs=StructuredOutputs(json=case["schema"]),
                    temperature=1,
                    seed=seed,
                    max_tokens=options.max_tokens,
                )
                for case in served
                for seed in range(options.answers)
            ]
            answers = llm.generate([[5, 6]] * len(params), params)
    ended, invalid = 0, []
    for number, answer in enumerate(answers):
        case = served[number // options.answers]
        if answer["finish_reason"] == "stop":
            ended += 1
            try:
                validator = jsonschema.validators.validator_for(case["schema"])
                validator(case["schema"], format_checker=validator.FORMAT_CHECKER).validate(json.loads(answer["text"]))
            except (ValueError, jsonschema.ValidationError) as error:
                invalid.append(f"{case['name']}: {str(error).splitlines()[0]}: {answer['text']}")
    return ended, invalid


def _percentiles(seconds: list[float], scale: float = 1e3) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": round(cuts[49] * scale, 2), "p99": round(cuts[98] * scale, 2), "max": round(max(seconds) * scale, 2)}


if __name__ == "__main__":
    main()
