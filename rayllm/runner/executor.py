"""Executes steps on one shard's device."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import torch
from rayllm_kernels import (
    Rope,
    compact_kv,
    compiling,
    decode_attention,
    divide_decodes,
    prefill_attention,
    prefill_backend,
    rope_and_store,
    select_kept,
)

from rayllm.checkpoint.sources import ModelSource
from rayllm.checkpoint.weights import load_weights
from rayllm.config import SINKS, EngineConfig
from rayllm.messages.step import LaneStart, Logprobs, PromptLogprobs, Prune, StepInput, StepOutput, StepTimes, pack_ids
from rayllm.models.decoder import build_model
from rayllm.models.parallel import TensorParallel
from rayllm.progress import Track, untracked
from rayllm.runner import kv_cache, precompile
from rayllm.runner.cuda_graphs import ModelOutput, StepGraphs, graph_shapes
from rayllm.runner.device import DTYPES, Device, HostCopies, Stopwatch
from rayllm.runner.lanes import Lanes
from rayllm.runner.model_input import ModelInput, Rows, Shape, pack, pack_padding, take_rows, unpack
from rayllm.runner.sampler import LogprobTensors, Sampler, top_logprobs
from rayllm.sampling_params import SamplingParams
from rayllm.scheduling.pruning import MAX_PRUNES, make_policy

PROMPT_LOGPROB_ROWS = 512
"""Prompt tokens whose logits over the whole vocabulary exist at once."""
SCORES_AT_ONCE = 1 << 22
"""Keys of layers and KV heads whose pruning scores exist at once; choosing among them takes ten times their memory."""


class ModelRunner:
    """Model, KV cache and lanes of one shard. Every method runs the same on all ranks, in step."""

    def __init__(self, config: EngineConfig, source: ModelSource, tp: TensorParallel, device: Device):
        assert config.max_model_len is not None
        self.config = config
        self.source = source
        self.tp = tp
        self.device = device
        self.model = build_model(source.config, tp, device.torch_device, DTYPES[config.dtype], config.max_model_len)
        self.scale = source.config.head_dim**-0.5
        self.policy = make_policy(config)
        window = self.policy.window if self.policy else 0
        heads = source.config.num_attention_heads // tp.size
        self.windows = torch.empty(
            (source.config.num_hidden_layers, self._max_prunes, window, heads, source.config.head_dim),
            dtype=DTYPES[config.dtype],
            device=device.torch_device,
        )
        """Queries of the windows of the prompts that a step prunes, [layers, prompts, window, Hq, D]."""
        threading.Thread(target=self._import_attention, daemon=True).start()  # takes seconds

    def _import_attention(self) -> None:
        if self.device.is_cuda:
            torch.cuda.set_device(self.device.torch_device)  # of this thread
        self.prefill_backend()

    def prefill_backend(self) -> str:
        return prefill_backend(DTYPES[self.config.dtype], self.source.config.head_dim)

    def load(self, track: Track = untracked) -> int:
        """Fills the weights; returns the bytes read."""
        bytes_read = load_weights(self.model, self.source, self.tp, track)
        self.model.pack()
        return bytes_read

    def count_blocks(self) -> int:
        """KV cache blocks that fit beside the weights and the largest step."""
        activation_bytes = self._profile() if self.device.is_cuda else 0
        return kv_cache.count_blocks(self.config, self.source.config, self.device, activation_bytes)

    def allocate(self, num_blocks: int) -> None:
        """Makes KV cache and lanes; `execute` works from here on, without graphs."""
        config = self.config
        assert config.max_model_len is not None
        self.keys, self.values = kv_cache.allocate(config, self.source.config, self.device, num_blocks)
        self.lanes = Lanes(config.max_num_seqs, config.max_model_len, config.block_size, num_blocks, self.device)
        self.sampler = Sampler(self.lanes, self.source.config.vocab_size, self.tp)
        self.graphs = StepGraphs(self._forward, self.lanes, [])

    @torch.inference_mode()
    def compile(self) -> None:
        """Compiles the kernels of all kinds of steps, many at a time: one by one, as they run, takes far longer."""
        if not self.device.is_cuda:
            return
        self.allocate(1)
        decodes = [shape for shape in self._graph_shapes if not shape.num_chunks]
        chunked = [shape for shape in self._graph_shapes if shape.num_chunks]
        with compiling():
            for shape in (*decodes[:2], decodes[-1], chunked[0], chunked[-1]):
                if shape.num_chunks:
                    precompile.wait()
                packed = self.device.put(pack_padding(shape, self.lanes.padding))
                output = self._forward(unpack(packed, shape, self.lanes))
            self.sampler.launch_filter(output.logits)
            self._prune_nothing()

    @property
    def _graph_shapes(self) -> list[Shape]:
        config = self.config
        assert config.max_num_batched_tokens is not None and config.max_model_len is not None
        return graph_shapes(config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len, self._max_prunes)

    @property
    def _max_prunes(self) -> int:
        """Prompts that one step prunes, at most."""
        return min(MAX_PRUNES, self.config.max_num_seqs) if self.policy else 0

    @torch.inference_mode()
    def capture(self, track: Track = untracked) -> None:
        """Captures steps of all sizes as CUDA graphs, where there are such."""
        if self.device.is_cuda and not self.config.enforce_eager:
            self.graphs = StepGraphs(self._forward, self.lanes, self._graph_shapes, track)

    @torch.inference_mode()
    def execute(self, step: StepInput) -> PendingOutput:
        """Computes `step`. On a GPU this returns when all is queued; `PendingOutput.wait` waits for the tokens."""
        began, on_device, pruning = time.perf_counter(), Stopwatch(self.device), Stopwatch(self.device)
        self.lanes.apply(step)
        rows = take_rows(step, self.lanes)
        own = Shape.of(rows)
        shape = self.graphs.find(own)
        packed = pack(rows, shape or own, self.lanes.padding)
        on_device.start()
        if shape is not None:
            output = self.graphs(packed, shape)
        else:
            output = self._forward(unpack(self.device.put(packed), own, self.lanes))
        if step.prunes:
            pruning.start()
            self._prune(step.prunes, rows)
            pruning.stop()
        token_ids, logprobs = output.token_ids[: own.num_samples], None
        lanes = rows.lanes[rows.samples]
        if not self.sampler.is_plain(lanes):
            places = self.device.put(np.stack((lanes, self.lanes.num_tokens[lanes] - 1)))
            token_ids, logprobs = self.sampler.draw_processed(output.logits[: own.num_samples], lanes, *places)
        prompts = self._prompt_logprobs(rows, output.hidden)
        on_device.stop()
        return PendingOutput(
            step,
            token_ids,
            logprobs,
            self.lanes.logprobs[lanes],
            prompts,
            launch_s=time.perf_counter() - began,
            on_device=on_device,
            pruning=pruning,
        )

    def _forward(self, inputs: ModelInput, logits_out: torch.Tensor | None = None) -> ModelOutput:
        """The whole of a step's computation but for pruning, as a CUDA graph captures it."""
        shape, n = inputs.shape, inputs.shape.num_decodes
        tables, kv_lens = inputs.block_tables, inputs.kv_lens
        items = divide_decodes(kv_lens[:n], self.keys[0])
        window_rows = None
        if shape.num_prunes:
            assert self.policy is not None
            steps = torch.arange(-self.policy.window, 0, device=kv_lens.device)
            window_rows = (inputs.window_ends[:, None] + steps).clamp_(min=0).flatten()

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope) -> torch.Tensor:
            keys, values = self.keys[layer], self.values[layer]
            # stored before attending: a block can be hit in this very step
            q = rope_and_store(q, k, v, rope, keys, values, inputs.slot_mapping)
            if window_rows is not None:
                torch.index_select(q, 0, window_rows, out=self.windows[layer, : shape.num_prunes].flatten(0, 1))
            out = None
            if shape.num_chunks:
                chunks = (tables[n:], inputs.cu_seqlens_q, kv_lens[n:], shape.max_seqlen_q, shape.max_kv_len)
                out = prefill_attention(q, keys, values, *chunks, self.scale)
            if n:  # padding rows among them, without keys, stand where chunks have their first tokens: left as they are
                decodes = (q[:n], keys, values, tables[:n], kv_lens[:n], self.scale, shape.max_kv_len, items)
                decoded = decode_attention(*decodes, out=None if out is None else out[:n])
            return decoded if out is None else out

        hidden = self.model(inputs.token_ids, inputs.positions, attend)
        logits = self.model.compute_logits(hidden[inputs.sample_rows], logits_out)
        token_ids = self.sampler.draw(logits, inputs.sample_lanes, inputs.sample_positions)
        return ModelOutput(hidden, logits, token_ids)

    def _prune(self, prunes: list[Prune], rows: Rows) -> None:
        """Copies what each prompt keeps into its new blocks, which its lane has from then on."""
        for i, (prune, row) in enumerate(zip(prunes, rows.pruned, strict=True)):
            table = self.lanes.block_tables[prune.lane]
            new_table = self.device.put(np.array(prune.block_table, np.int32))
            self._prune_prompt(self.windows[:, i], table, int(rows.kv_lens[row]), prune.num_kept, new_table)
        self.lanes.prune(prunes)

    @torch.inference_mode()
    def _prune_nothing(self) -> None:
        """Prunes the longest prompt, as it were, within the spare block: to compile and to measure."""
        if self.policy is not None:
            table, length = self.lanes.block_tables[self.lanes.padding], self.config.max_model_len
            assert length is not None
            self._prune_prompt(self.windows[:, 0], table, length, min(self.config.snapkv_limit, length), table)

    def _prune_prompt(
        self, windows: torch.Tensor, table: torch.Tensor, kv_len: int, num_kept: int, new_table: torch.Tensor
    ) -> None:
        """windows: [layers, window, Hq, D]. As many layers at a time as `SCORES_AT_ONCE` allows."""
        assert self.policy is not None
        always = {"sinks": SINKS, "window": self.policy.window, "pool_width": self.policy.pool_width}
        size = max(1, SCORES_AT_ONCE // (kv_len * self.keys.shape[3]))
        for queries, keys, values in zip(*(x.split(size) for x in (windows, self.keys, self.values)), strict=True):
            scores = self.policy.score(queries, keys, table, kv_len, self.scale)
            compact_kv(keys, values, table, select_kept(scores, num_kept, **always), new_table)

    def _prompt_logprobs(self, rows: Rows, hidden: torch.Tensor) -> list[tuple[int, int, LogprobTensors]]:
        """(chunk, first position, log-probabilities) of the prompt tokens that follow each chunk's tokens."""
        parts = []
        for row in range(rows.num_decodes, len(rows.lanes)):
            lane, start, end = rows.lanes[row], rows.starts[row], rows.starts[row] + rows.num_tokens[row]
            wanted = self.lanes.prompt_logprobs[lane]
            end = min(end, self.lanes.num_prompt_tokens[lane] - 1)  # the last token's successor is not of the prompt
            first_row = rows.ends[row] - rows.num_tokens[row]
            for first in range(start, end if wanted >= 0 else start, PROMPT_LOGPROB_ROWS):
                last = min(first + PROMPT_LOGPROB_ROWS, end)
                states = hidden[first_row + first - start : first_row + last - start]
                logits = self.tp.all_gather(self.model.compute_logits(states))[:, : self.source.config.vocab_size]
                targets = self.lanes.token_ids[lane, first + 1 : last + 1].long()
                part = top_logprobs(logits.float(), targets, int(wanted))
                parts.append((row - rows.num_decodes, int(first) + 1, part))
        return parts

    def _profile(self) -> int:
        """Bytes that the largest step needs beside weights and cache, with everything that sampling can ask for."""
        config = self.config
        assert config.max_num_batched_tokens is not None and config.max_model_len is not None
        length = min(config.max_num_batched_tokens // config.max_num_seqs, config.max_model_len - 1)
        table = list(range(-(-length // config.block_size)))
        params = SamplingParams(top_p=0.9, presence_penalty=1, logprobs=20)
        step = StepInput(
            incarnation=0,
            step=0,
            starts=[
                LaneStart(lane, pack_ids([0] * length), length, 0, table, params, 0, [], None)
                for lane in range(config.max_num_seqs)
            ],
            new_blocks=[],
            decode_lanes=[],
            chunks=[number for lane in range(config.max_num_seqs) for number in (lane, length)],
        )
        self.allocate(len(table))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.execute(step).wait()
        activation_bytes = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._prune_nothing()  # beside what graphs hold
        activation_bytes += torch.cuda.max_memory_allocated() - before
        del self.keys, self.values, self.lanes, self.sampler, self.graphs
        gc.collect()
        torch.cuda.empty_cache()
        return activation_bytes


class PendingOutput:
    """A step's output on its way to the host."""

    def __init__(
        self,
        step: StepInput,
        token_ids: torch.Tensor,
        logprobs: LogprobTensors | None,
        wanted: np.ndarray,
        prompts: list[tuple[int, int, LogprobTensors]],
        *,
        launch_s: float,
        on_device: Stopwatch,
        pruning: Stopwatch,
    ):
        """`wanted` [S]: how many logprobs each sampled token's lane asked for, -1 for none."""
        self._step = step
        self._launch_s, self._on_device, self._pruning = launch_s, on_device, pruning
        self._wanted = wanted.tolist()
        self._prompts = [(chunk, start) for chunk, start, _ in prompts]
        tables = ([logprobs] if logprobs else []) + [part for _, _, part in prompts]
        self._copies = HostCopies(
            [token_ids] + [t for table in tables for t in (table.token_ids, table.logprobs, table.ranks)]
        )

    def wait(self) -> StepOutput:
        """Blocks until the tokens are there. May be called on another thread than the one that executes."""
        token_ids, *columns = self._copies.wait()
        tables = [_rows(*columns[i : i + 3]) for i in range(0, len(columns), 3)]
        logprobs = {}
        if len(tables) > len(self._prompts):
            own = tables.pop(0)
            logprobs = {i: _cut(own[i], wanted) for i, wanted in enumerate(self._wanted) if wanted >= 0}
        prompts = [PromptLogprobs(*place, table) for place, table in zip(self._prompts, tables, strict=True)]
        times = StepTimes(self._launch_s, self._on_device.seconds(), self._pruning.seconds())
        return StepOutput(self._step.incarnation, self._step.step, token_ids, logprobs, prompts, times)


def _rows(token_ids: list, logprobs: list, ranks: list) -> list[Logprobs]:
    return [Logprobs(*row) for row in zip(token_ids, logprobs, ranks, strict=True)]


def _cut(entry: Logprobs, k: int) -> Logprobs:
    return Logprobs(entry.token_ids[: 1 + k], entry.logprobs[: 1 + k], entry.rank)
