"""A step's output, from the device to a message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rayllm.messages.step import Logprobs, PromptLogprobs, StepInput, StepOutput, StepTimes
from rayllm.runner.device import Device, HostCopies, Stopwatch
from rayllm.runner.grammars import LaneGrammar, SampledTokens
from rayllm.runner.sampler import LogprobTensors


@dataclass(frozen=True)
class PromptPart:
    """Log-probabilities of consecutive prompt tokens, the first of them at position `start`, that a row computed."""

    row: int
    start: int
    logprobs: LogprobTensors


@dataclass(frozen=True)
class StepClocks:
    """The clocks of one step."""

    launch_s: float
    on_device: Stopwatch
    pruning: Stopwatch


class PendingOutput:
    """A step's output on its way to the host."""

    def __init__(
        self,
        device: Device,
        step: StepInput,
        token_ids: torch.Tensor,
        logprobs: LogprobTensors | None,
        wanted: np.ndarray,
        prompts: list[PromptPart],
        grammars: Sequence[tuple[int, LaneGrammar]],
        clocks: StepClocks,
    ):
        """token_ids: [S] int64. `wanted` [S]: how many logprobs each sampled token's lane asked for, -1 for none."""
        self._step = step
        self._clocks = clocks
        self._wanted: list[int] = wanted.tolist()
        self._copies = HostCopies(device)
        self._token_ids = self._copies.add(token_ids)
        self._logprobs = None if logprobs is None else logprobs.copied(self._copies)
        self._prompts = [PromptPart(part.row, part.start, part.logprobs.copied(self._copies)) for part in prompts]
        self._copies.record()
        self.sampled = SampledTokens(self._copies, self._token_ids, grammars)

    def wait(self) -> StepOutput:
        """Blocks until the tokens are there. May be called on another thread than the one that executes."""
        self._copies.wait()
        logprobs = {}
        if self._logprobs is not None:
            entries = zip(self._logprobs.entries(), self._wanted, strict=True)
            logprobs = {i: _cut(entry, wanted) for i, (entry, wanted) in enumerate(entries) if wanted >= 0}
        clocks, ends = self._clocks, self.sampled.ends()
        return StepOutput(
            incarnation=self._step.incarnation,
            step_id=self._step.step_id,
            token_ids=self._token_ids.tolist(),
            logprobs=logprobs,
            prompt_logprobs=[PromptLogprobs(part.row, part.start, part.logprobs.entries()) for part in self._prompts],
            times=StepTimes(clocks.launch_s, clocks.on_device.seconds(), clocks.pruning.seconds()),
            ends=ends,
        )


def _cut(entry: Logprobs, k: int) -> Logprobs:
    return Logprobs(entry.token_ids[: 1 + k], entry.logprobs[: 1 + k], entry.rank)
