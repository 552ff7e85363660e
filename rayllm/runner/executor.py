"""Executes steps on one shard's device: rows → the model's input → model → sampler → pruning → output."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from rayllm.messages.step import StepInput
from rayllm.model_config import KVGroup
from rayllm.progress import Track, untracked
from rayllm.runner import kv_cache
from rayllm.runner.attention import AttentionByLayer, FullAttention
from rayllm.runner.cuda_graphs import ModelOutput, StepGraphs, graph_shapes
from rayllm.runner.device import DTYPES, Stopwatch
from rayllm.runner.grammars import Grammars
from rayllm.runner.lanes import Lanes
from rayllm.runner.loading import LoadedModel
from rayllm.runner.model_input import ModelInput, Rows, Shape, pack, unpack
from rayllm.runner.output import PendingOutput, PromptPart, StepClocks
from rayllm.runner.pruning import Pruner
from rayllm.runner.sampler import Sampler, top_logprobs
from rayllm.scheduling.pruning import MAX_PRUNES, make_policy

PROMPT_LOGPROB_ROWS = 512
"""Prompt tokens whose logits over the whole vocabulary exist at once."""


class Executor:
    """KV cache and lanes of one shard beside its model. Every method runs the same on all ranks, in step.

    `num_blocks`: the size of each KV group's cache. With `capture`, steps of all sizes are captured as CUDA graphs,
    where there are such.
    """

    @torch.inference_mode()
    def __init__(
        self, loaded: LoadedModel, num_blocks: Sequence[int], *, capture: bool = False, track: Track = untracked
    ):
        config = loaded.config
        self.loaded = loaded
        policy = make_policy(config)
        self._max_prunes = min(MAX_PRUNES, config.max_num_seqs) if policy else 0
        self._window = policy.window if policy else 0
        self.attentions = [
            self._attention(group, number)
            for group, number in zip(loaded.model_config.kv_groups, num_blocks, strict=True)
        ]
        """One for each KV group."""
        self.lanes = Lanes(config.max_num_seqs, config.max_model_len, config.block_size, num_blocks, loaded.device)
        self.sampler = Sampler(self.lanes, loaded.model_config.vocab_size, loaded.tp)
        self._grammars = Grammars(loaded.tokenizer_path, loaded.model_config) if loaded.tp.rank == 0 else None
        self.pruner = Pruner(policy, self.attentions, self.lanes) if policy else None
        captures = capture and loaded.device.is_cuda and not config.enforce_eager
        self._graphs = StepGraphs(self.forward, self.lanes, self.graph_shapes if captures else [], track)

    def _attention(self, group: KVGroup, num_blocks: int) -> FullAttention:
        config, model_config, device = self.loaded.config, self.loaded.model_config, self.loaded.device
        keys, values = kv_cache.allocate(config, model_config, group, device, num_blocks)
        heads = model_config.num_attention_heads // self.loaded.tp.size
        windows = (len(group.layers), self._max_prunes, self._window, heads, model_config.head_dim)
        return FullAttention(
            layers=group.layers,
            keys=keys,
            values=values,
            windows=torch.empty(windows, dtype=DTYPES[config.dtype], device=device.torch_device),
            scale=model_config.head_dim**-0.5,
        )

    @property
    def graph_shapes(self) -> list[Shape]:
        """The sizes of steps that are captured."""
        config = self.loaded.config
        return graph_shapes(config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len, self._max_prunes)

    @torch.inference_mode()
    def execute(self, step: StepInput) -> PendingOutput:
        """Computes `step`. On a GPU this returns when all is queued; `PendingOutput.wait` waits for the tokens."""
        device = self.loaded.device
        began, on_device, pruning = time.perf_counter(), Stopwatch(device), Stopwatch(device)
        self.lanes.apply(step)
        if self._grammars is not None:
            self._grammars.start(step.starts)
        rows = Rows.of(step, len(self.attentions))
        own = Shape.of(rows)
        shape = self._graphs.find(own)
        packed = pack(rows, shape or own, self.lanes.padding)
        on_device.start()
        if shape is not None:
            output = self._graphs(packed, shape)
        else:
            output = self.forward(unpack(device.put(packed), own, self.lanes))
        if step.prunes:
            assert self.pruner is not None, "an engine that prunes has a policy"
            pruning.start()
            self.pruner.prune(step.prunes, rows)
            pruning.stop()
        token_ids, logprobs = output.token_ids[: own.num_samples], None
        lanes = rows.sample_lanes
        grammars = self._grammars.of(lanes) if self._grammars else []
        if not self.sampler.is_plain(lanes):
            logits = output.logits[: own.num_samples]
            masks = self._grammars.masks(grammars, own.num_samples) if self._grammars and grammars else None
            token_ids, logprobs = self.sampler.draw_processed(logits, lanes, rows.sample_positions, masks)
        prompts = self._prompt_logprobs(rows, output.hidden)
        on_device.stop()
        clocks = StepClocks(time.perf_counter() - began, on_device, pruning)
        pending = PendingOutput(
            device, step, token_ids, logprobs, self.lanes.logprobs[lanes], prompts, grammars, clocks
        )
        if self._grammars and grammars:
            self._grammars.await_tokens(pending.sampled)
        return pending

    def forward(self, inputs: ModelInput, logits_out: torch.Tensor | None = None) -> ModelOutput:
        """The whole of a step's computation but for pruning, as a CUDA graph captures it."""
        model = self.loaded.model
        hidden = model(inputs.token_ids, inputs.positions, AttentionByLayer(self.attentions, inputs))
        logits = model.compute_logits(hidden[inputs.sample_tokens], logits_out)
        token_ids = self.sampler.draw(logits, inputs.sample_lanes, inputs.sample_positions)
        return ModelOutput(hidden, logits, token_ids)

    def _prompt_logprobs(self, rows: Rows, hidden: torch.Tensor) -> list[PromptPart]:
        """What is said of the prompt tokens that follow each chunk's tokens."""
        loaded, ends = self.loaded, rows.ends
        parts = []
        for row in range(rows.num_decodes, len(rows.lanes)):
            lane, start = int(rows.lanes[row]), int(rows.positions[row])
            wanted = int(self.lanes.prompt_logprobs[lane])
            if wanted < 0:
                continue
            num_tokens = int(rows.num_tokens[row])
            # the last token's successor is not of the prompt
            end = min(start + num_tokens, int(self.lanes.num_prompt_tokens[lane]) - 1)
            first_token = int(ends[row]) - num_tokens
            for first in range(start, end, PROMPT_LOGPROB_ROWS):
                last = min(first + PROMPT_LOGPROB_ROWS, end)
                states = hidden[first_token + first - start : first_token + last - start]
                logits = loaded.tp.all_gather(loaded.model.compute_logits(states))[:, : loaded.model_config.vocab_size]
                targets = self.lanes.token_ids[lane, first + 1 : last + 1].long()
                parts.append(PromptPart(row, first + 1, top_logprobs(logits.float(), targets, wanted)))
        return parts
