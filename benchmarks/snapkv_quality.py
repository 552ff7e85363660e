"""What a pruned KV cache costs in answers: pass keys to be found in prompts of about 1,900 tokens.

    python benchmarks/snapkv_quality.py .cache/SmolLM2-135M-Instruct.Q4_1.gguf

The full cache and the engine's own policies answer `--prompts` prompts through the engine. Those and two other rules
answer the first `--compared` of them in this process, where the KL divergence from the full cache is seen too, and
further prompts: three keys of which one is asked for, and the question put after the context was pruned. Prints one
JSON line, and tables on stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rayllm import LLM, SamplingParams
from rayllm.checkpoint.sources import ModelSource, resolve_model
from rayllm.config import EngineArgs
from rayllm.frontend.tokenizer import Tokenizer
from rayllm.messages.base import pack_ids
from rayllm.messages.step import LaneStart, Prune, StepInput
from rayllm.models.parallel import TensorParallel
from rayllm.runner.cuda_graphs import ModelOutput
from rayllm.runner.device import open_device
from rayllm.runner.executor import Executor
from rayllm.runner.loading import load_model
from rayllm.runner.model_input import ModelInput
from rayllm.runner.pruning import SCORES, Pruner
from rayllm.sampling_params import SnapkvLimit
from rayllm.scheduling.pruning import PruningPolicy, snapkv, streaming

KEPT = {"50 %": 0.5, "25 %": 0.25, "12.5 %": 0.125}
CONTEXT_LEN = 1850
ENGINE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 2304, "max_num_seqs": 8}
ENGINE |= {"enable_snapkv": True, "snapkv_limit": 2304}
CHUNK = 1024

# ---- prompts

TEMPLATES = (
    "On {day} the {person} carried a {adjective} {thing} from the {place} to the {place}.",
    "Nobody at the {place} had ever seen such a {adjective} {thing} before.",
    "The {person} said that the {thing} near the {place} was {adjective} again.",
    "Every {day} a {adjective} {person} waits by the {place} for the {person}.",
    "After the rain, the {place} looked {adjective} and the {thing} was gone.",
    "It took the {person} until {day} to repair the {adjective} {thing}.",
    "If the {person} comes back, the {thing} will stay in the {place}.",
    "There is a {adjective} {thing} between the {place} and the {place}.",
)
WORDS = {
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "person": "baker sailor teacher farmer doctor painter neighbour judge gardener singer tailor pilot",
    "place": "harbour market bridge library station garden mill school orchard square tower valley",
    "thing": "lantern basket clock carpet ladder kettle bicycle violin wagon mirror barrel painting",
    "adjective": "quiet yellow broken heavy tall narrow bright dusty gentle strange cold wooden",
}
NAMES = ("pass key", "phone number", "bank account")
INTRODUCTION = "There is a {names} in this text. Find it and remember it. "
TOLD = "The {name} is {key}. Remember it."
QUESTION = "What is the {name}? Answer with its five digits."
ANSWER = "The {name} is"


@dataclass(frozen=True)
class Prompt:
    """Token ids: `context` has keys and filler, `question` goes on up to the answer's first words; the answer is a
    blank and five digits."""

    context: list[int]
    question: list[int]
    answer: list[int]


def make_prompt(rng: random.Random, tokenizer: Tokenizer, names: tuple[str, ...]) -> Prompt:
    """Each of `names` gets a number, one of them is asked for."""
    keys = [str(rng.randrange(10000, 100000)) for _ in names]
    told = [TOLD.format(name=name, key=key) for name, key in zip(names, keys, strict=True)]
    sentences: list[str] = []
    length = sum(len(tokenizer.encode(" " + text)) for text in told)
    while length < CONTEXT_LEN:
        sentences.append(re.sub(r"{(\w+)}", lambda kind: rng.choice(WORDS[kind[1]].split()), rng.choice(TEMPLATES)))
        length += len(tokenizer.encode(" " + sentences[-1]))
    for text in told:
        sentences.insert(rng.randrange(len(sentences)), text)
    asked = rng.randrange(len(names))
    text = INTRODUCTION.format(names=" and a ".join(names)) + " ".join(sentences)
    bare, whole = (
        tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": text + question}]), False)
        for question in ("", "\n\n" + QUESTION.format(name=names[asked]))
    )
    whole += tokenizer.encode(ANSWER.format(name=names[asked]))
    end = next(i for i, (one, other) in enumerate(zip(bare, whole, strict=False)) if one != other)
    return Prompt(whole[:end], whole[end:], tokenizer.encode(f" {keys[asked]}"))


# ---- rules to compare with


def window_weights(q: Tensor, k_cache: Tensor, block_table: Tensor, kv_len: int, scale: float) -> Tensor:
    """The weights of the window's queries: [layers, KV heads, query heads of each, window, keys]."""
    window = q.shape[1]
    causal = torch.ones(window, kv_len, dtype=torch.bool).tril(kv_len - window)
    weights = []
    for queries, cache in zip(q, k_cache, strict=True):
        keys = cache[block_table].flatten(0, 1)[:kv_len]
        logits = torch.einsum("whgd,khd->hgwk", queries.unflatten(1, (keys.shape[1], -1)), keys) * scale
        weights.append(logits.masked_fill(~causal, -torch.inf).softmax(dim=-1))
    return torch.stack(weights)


def seed_scores(*window: Any) -> Tensor:
    """One selection for all heads: the weights of all queries, summed over all heads, not pooled."""
    weights = window_weights(*window)
    return weights.sum(dim=(1, 2, 3)).unsqueeze(1).expand(-1, weights.shape[1], -1)


def kvpress_scores(q: Tensor, *window: Any) -> Tensor:
    """SnapKV as kvpress has it by default: average-pooled, the mean of the query heads of a group."""
    size = q.shape[1]
    means = window_weights(q, *window)[..., :-size].mean(dim=3)
    pooled = F.avg_pool1d(means.flatten(0, 1), kernel_size=5, padding=2, stride=1).view(means.shape).mean(dim=2)
    return F.pad(pooled, (0, size), value=1.0)


SCORES.update({"seed": seed_scores, "kvpress": kvpress_scores})
RULES: dict[str, PruningPolicy | None] = {
    "full cache": None,
    "snapkv": snapkv(limit=0, block_size=1, window=32),
    "streaming": streaming(limit=0, block_size=1),
    "seed": PruningPolicy("seed", limit=0, block_size=1, window=128, pool_width=1),
    "kvpress": PruningPolicy("kvpress", limit=0, block_size=1, window=64, pool_width=1),
}

# ---- in this process


class Runner(Executor):
    """A shard's executor with one sequence at a time, whose logits can be seen."""

    def __init__(self, model: str, source: ModelSource):
        config = EngineArgs(model=model, **ENGINE).resolve(source.config, "cpu")
        self.num_blocks = config.max_model_len // config.block_size
        loaded = load_model(config, source, TensorParallel(), open_device("cpu", [], 1))
        super().__init__(loaded, [2 * self.num_blocks])

    def forward(self, inputs: ModelInput, logits_out: Tensor | None = None) -> ModelOutput:
        output = super().forward(inputs, logits_out)
        self.hidden = output.hidden
        return output

    def run(
        self, position: int, slot: int, num_tokens: int, starts: Sequence[LaneStart] = (), prunes: Sequence[Prune] = ()
    ) -> None:
        rows = pack_ids([0, position, num_tokens, 0, slot, slot + num_tokens])  # nothing is sampled
        self.execute(StepInput(0, 0, list(starts), [], rows, 0, list(prunes))).wait()

    def start(self, token_ids: list[int], num_prompt_tokens: int) -> list[LaneStart]:
        table, params = list(range(self.num_blocks)), SamplingParams(temperature=0)
        return [LaneStart(0, pack_ids(token_ids), num_prompt_tokens, [table], params, 0, [], None)]

    def prefill(self, token_ids: list[int]) -> None:
        starts = self.start(token_ids, len(token_ids))
        for first in range(0, len(token_ids), CHUNK):
            self.run(first, first, min(CHUNK, len(token_ids) - first), starts if not first else [])

    @torch.inference_mode()
    def answer(self, token_ids: list[int], prompt_len: int, kept: int, policy: PruningPolicy | None) -> Tensor:
        """Log-probabilities over the vocabulary for each of the last five tokens, over what `policy` keeps of the
        first `prompt_len`, which are in the cache: [5, V]."""
        prunes, last, slot = [], 1, prompt_len
        if policy is not None:
            [attention] = self.attentions
            shape = *attention.windows.shape[:2], policy.window, *attention.windows.shape[3:]
            self.attentions = [dataclasses.replace(attention, windows=attention.windows.new_empty(shape))]
            self.pruner = Pruner(policy, self.attentions, self.lanes)
            prunes = [Prune(0, kept, [list(range(self.num_blocks, 2 * self.num_blocks))])]
            last, slot = max(policy.window, 1), kept
        first = prompt_len - last
        self.run(first, first, last, self.start(token_ids, prompt_len), prunes)
        self.run(prompt_len, slot, len(token_ids) - prompt_len)
        logits = self.loaded.model.compute_logits(self.hidden[-6:-1])[:, : self.loaded.model_config.vocab_size]
        return logits.double().log_softmax(dim=-1)


@dataclass
class Score:
    exact: list[bool] = field(default_factory=list)
    """Whether the answer was exact, for each prompt."""
    kl: list[float] = field(default_factory=list)
    """KL divergence from the full cache for each prompt, the mean over the five digits; empty where it is unknown."""

    def line(self) -> dict[str, Any]:
        """The figures, with the 95 % Wilson interval of the share of exact answers."""
        count, share, z2 = len(self.exact), sum(self.exact) / len(self.exact), 1.96**2 / len(self.exact)
        half = (share * (1 - share) * z2 + z2**2 / 4) ** 0.5
        interval = [round((share + z2 / 2 + sign * half) / (1 + z2), 3) for sign in (-1, 1)]
        kl = {"kl": round(sum(self.kl) / count, 4)} if self.kl else {}
        return {"exact": sum(self.exact), "of": count, "interval": interval, **kl}

    def cell(self) -> str:
        line = self.line()
        return f"{line['exact']}/{line['of']}" + (f", KL {line['kl']:.3f}" if self.kl else "")


Scores = dict[str, dict[str, Score]]
"""Scores by rule and by share of the prompt that is kept."""


def show(title: str, scores: Scores) -> None:
    rows = [[title, *KEPT]] + [[rule, *(own[kept].cell() for kept in KEPT)] for rule, own in scores.items()]
    print("\n".join("".join(text.ljust(24) for text in row) for row in rows), file=sys.stderr)


def num_kept(prompt_len: int, share: float) -> int:
    return round(prompt_len * share)


def compare(runner: Runner, prompts: list[Prompt], name: str, after_pruning: bool = False) -> Scores:
    """`after_pruning`: the question comes when the context has been pruned."""
    scores: Scores = {rule: {kept: Score() for kept in KEPT} for rule in RULES}
    for prompt in tqdm(prompts, name):
        token_ids = prompt.context + prompt.question + prompt.answer
        prompt_len = len(prompt.context) + (0 if after_pruning else len(prompt.question))
        runner.prefill(token_ids[:prompt_len])
        full = runner.answer(token_ids, prompt_len, 0, None)
        for rule, policy in RULES.items():
            for kept, share in KEPT.items():
                limit = num_kept(prompt_len, share)
                own = full if policy is None else runner.answer(token_ids, prompt_len, limit, policy)
                scores[rule][kept].exact.append(own.argmax(dim=-1).tolist() == prompt.answer[-5:])
                scores[rule][kept].kl.append(float((full.exp() * (full - own)).sum(dim=-1).mean()))
    show(name, scores)
    return scores


# ---- through the engine


def through_engine(model: str, prompts: list[Prompt], policy: str, shares: dict[str, float]) -> dict[str, Score]:
    """Scores by the share's name. Requests of one prompt stand together, so that all but the first find it cached."""
    requests = [(prompt, name) for prompt in prompts for name in shares]
    token_ids = [prompt.context + prompt.question for prompt, _ in requests]
    kept = [num_kept(len(ids), shares[name]) for ids, (_, name) in zip(token_ids, requests, strict=True)]
    limits: list[SnapkvLimit] = ["all" if n == len(ids) else n for n, ids in zip(kept, token_ids, strict=True)]
    with LLM(model, snapkv_policy=policy, **ENGINE) as llm:
        params = [SamplingParams(temperature=0, max_tokens=6, snapkv_limit=limit) for limit in limits]
        results = llm.generate(token_ids, params)
    assert [len(ids) - result["num_pruned_tokens"] for ids, result in zip(token_ids, results, strict=True)] == kept
    scores = {name: Score() for name in shares}
    for (prompt, name), result in zip(requests, results, strict=True):
        scores[name].exact.append(result["token_ids"] == prompt.answer)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A model with a chat template.")
    parser.add_argument("--prompts", type=int, default=100, help="Prompts that are answered through the engine.")
    parser.add_argument("--compared", type=int, default=16, help="Prompts that are answered in this process.")
    options = parser.parse_args()
    source = resolve_model(options.model)
    tokenizer = Tokenizer.from_source(str(source.tokenizer_path))
    rngs = random.Random(0), random.Random(1)
    prompts = [make_prompt(rngs[0], tokenizer, NAMES[:1]) for _ in range(max(options.prompts, options.compared))]
    several = [make_prompt(rngs[1], tokenizer, NAMES) for _ in range(options.compared)]
    compared = prompts[: options.compared]

    engine = {"snapkv": through_engine(options.model, prompts, "snapkv", {"100 %": 1.0} | KEPT)}
    engine["full cache"] = dict.fromkeys(KEPT, engine["snapkv"].pop("100 %"))
    engine["streaming"] = through_engine(options.model, prompts, "streaming", KEPT)
    show("engine", engine)
    runner = Runner(options.model, source)
    parts: dict[str, Scores] = {
        "engine": engine,
        "one key": compare(runner, compared, "one key"),
        "three keys": compare(runner, several, "three keys"),
        "question after pruning": compare(runner, compared, "question after pruning", after_pruning=True),
    }
    both = [(own[kept].exact, parts["one key"][rule][kept].exact) for rule, own in engine.items() for kept in KEPT]
    differing = sum(one != other for pair in both for one, other in zip(*pair, strict=False))
    line: dict[str, Any] = {
        title: {rule: {kept: score.line() for kept, score in own.items()} for rule, own in scores.items()}
        for title, scores in parts.items()
    }
    lens = [len(prompt.context + prompt.question) for prompt in prompts]
    print(json.dumps({"prompt_tokens": [min(lens), max(lens)], "engine_differs": differing} | line))


if __name__ == "__main__":
    main()
