"""What a shard keeps of running sequences: tokens, block tables and sampling parameters, by lane.

Sampled tokens stay on the device: a step writes them into `token_ids`, the next one reads them there. What the host
must know to prepare a step (kinds of sampling) does not depend on them and is kept in numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rayllm.config import blocks_for
from rayllm.messages.step import LaneStart, NewBlock, Prune, StepInput
from rayllm.runner.device import Device
from rayllm.sampling_params import SamplingParams

FOREVER = 2**31 - 1
LEAST_TEMPERATURE = 1e-30
"""Logits divided by less may not be finite: what is below is greedy."""


class Lanes:
    """`num_lanes` lanes and one more, the last, which padding rows use; its block tables name the spare blocks.

    `num_blocks` are the sizes of the KV groups' caches without the spare block, which comes last.
    """

    def __init__(self, num_lanes: int, max_model_len: int, block_size: int, num_blocks: Sequence[int], device: Device):
        rows = num_lanes + 1
        self.device = device
        self.block_size = block_size
        self.padding = num_lanes
        self.num_prompt_tokens = np.zeros(rows, np.int64)
        self.logprobs = np.full(rows, -1)
        """How many logprobs to report of each output token; -1: none."""
        self.prompt_logprobs = np.full(rows, -1)
        """How many to report of each prompt token; -1: none."""
        self.is_filtered = np.zeros(rows, bool)
        """top_k, top_p or min_p is used."""
        self.is_penalized = np.zeros(rows, bool)
        self.is_biased = np.zeros(rows, bool)
        self.is_constrained = np.zeros(rows, bool)
        """A grammar says what may come."""

        def on_device(*shape: int, dtype: torch.dtype, fill: float = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device.torch_device)

        self.token_ids = on_device(rows, max_model_len + 1, dtype=torch.int32)
        columns = blocks_for(max_model_len, block_size)
        self.block_tables = [on_device(rows, columns, dtype=torch.int32, fill=number) for number in num_blocks]
        """One for each KV group, [rows, columns]."""
        self.seeds = on_device(rows, dtype=torch.int64)
        self.prompt_lens = on_device(rows, dtype=torch.int64)
        self._floats = on_device(rows, 6, dtype=torch.float32)
        self.temperature, self.top_p, self.min_p, self.repetition, self.presence, self.frequency = self._floats.T
        self.top_k = on_device(rows, dtype=torch.int64)
        self.bias_ids = on_device(rows, 0, dtype=torch.int64)
        """[rows, most entries of a lane]: logit_bias, and tokens banned for the first `bias_until` outputs."""
        self.bias_values = on_device(rows, 0, dtype=torch.float32)
        self.bias_until = on_device(rows, 0, dtype=torch.int64)

    def apply(self, step: StepInput) -> None:
        """Takes in the sequences and blocks that are new in this step."""
        if step.starts:
            self._start(step.starts)
        for group, table in enumerate(self.block_tables):
            if own := [new for new in step.new_blocks if new.group == group]:
                self._append(table, own)

    def _append(self, table: torch.Tensor, new_blocks: list[NewBlock]) -> None:
        entries = np.array([(new.lane, new.column, new.block) for new in new_blocks], np.int64)
        lanes, columns, blocks = self.device.put(np.ascontiguousarray(entries.T))
        table[lanes, columns] = blocks.int()

    def _start(self, starts: list[LaneStart]) -> None:
        lanes = np.array([start.lane for start in starts])
        params = [start.params for start in starts]
        self.num_prompt_tokens[lanes] = [start.num_prompt_tokens for start in starts]
        token_ids = [np.frombuffer(start.token_ids, np.int32) for start in starts]
        self.logprobs[lanes] = [-1 if p.logprobs is None else p.logprobs for p in params]
        self.prompt_logprobs[lanes] = [-1 if s.prompt_logprobs is None else s.prompt_logprobs for s in starts]
        self.is_filtered[lanes] = [p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params]
        self.is_penalized[lanes] = [
            p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0 for p in params
        ]
        self.is_constrained[lanes] = [start.grammar is not None for start in starts]
        self.is_biased[lanes] = [bool(p.logit_bias or s.banned_token_ids) for p, s in zip(params, starts, strict=True)]

        put = self.device.put
        rows = put(lanes)
        self.seeds[rows] = put(np.array([start.seed for start in starts]))
        self.prompt_lens[rows] = put(self.num_prompt_tokens[lanes])
        self.top_k[rows] = put(np.array([max(p.top_k, 0) for p in params]))
        self._floats[rows] = put(np.array([_floats(p) for p in params], np.float32))
        self._scatter(self.token_ids, lanes, token_ids)
        self.replace_tables(lanes, starts)
        if self.is_biased[lanes].any() or self.bias_ids.shape[1]:  # lanes may hold those of sequences before
            self._set_biases(lanes, starts)

    def replace_tables(self, lanes: np.ndarray, new: Sequence[LaneStart | Prune]) -> None:
        """Gives these lanes the block tables of `new`."""
        for group, table in enumerate(self.block_tables):
            self._scatter(table, lanes, [np.array(entry.block_tables[group]) for entry in new])

    def _scatter(self, table: torch.Tensor, lanes: np.ndarray, values: list[np.ndarray]) -> None:
        """Writes each array at the start of its lane's row; rows are as wide as the longest list may be."""
        lengths = np.array([len(row) for row in values])
        total = int(lengths.sum())
        flat = self.device.put(np.concatenate(values).astype(np.int32, copy=False))
        rows, firsts, counts = self.device.put(np.stack((lanes, lengths.cumsum() - lengths, lengths)))
        rows, firsts = (x.repeat_interleave(counts, output_size=total) for x in (rows, firsts))
        table[rows, torch.arange(total, device=table.device) - firsts] = flat

    def _set_biases(self, lanes: np.ndarray, starts: list[LaneStart]) -> None:
        entries = [
            [(token_id, value, FOREVER) for token_id, value in (start.params.logit_bias or {}).items()]
            + [(token_id, -np.inf, start.params.min_tokens) for token_id in start.banned_token_ids]
            for start in starts
        ]
        width = max(len(row) for row in entries)
        if (missing := width - self.bias_ids.shape[1]) > 0:
            self.bias_ids, self.bias_values, self.bias_until = (
                torch.nn.functional.pad(table, (0, missing))
                for table in (self.bias_ids, self.bias_values, self.bias_until)
            )
        padded = np.zeros((len(starts), self.bias_ids.shape[1], 3))
        for row, triples in zip(padded, entries, strict=True):
            row[: len(triples)] = np.array(triples).reshape(-1, 3)
        update, rows = self.device.put(padded), self.device.put(lanes)
        self.bias_ids[rows] = update[..., 0].long()
        self.bias_values[rows] = update[..., 1].float()
        self.bias_until[rows] = update[..., 2].long()


def _floats(params: SamplingParams) -> tuple[float, ...]:
    """The values of `Lanes.temperature` and those after it, in their order."""
    return (
        params.temperature if params.temperature >= LEAST_TEMPERATURE else 0.0,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )
