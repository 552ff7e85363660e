"""What a request may ask of the sampler. Names and meanings follow vLLM's SamplingParams."""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import get_args, get_origin

import msgspec

from rayllm.errors import UsageError

MAX_LOGPROBS = 64


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request; checked when made, so an instance is always valid.

    Raises `UsageError`, naming the field and what it may be.
    """

    n: int = 1
    """Number of choices; choice i samples with `seed + i`."""
    temperature: float = 1.0
    """0 is greedy (ties go to the lower token id)."""
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or output are divided (positive) or multiplied (negative) by it."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    """Token id → value added to its logit."""
    seed: int | None = None
    """Same seed, same prompt, same output, whatever else is in the batch; None draws one."""
    max_tokens: int | None = 16
    """None: up to the end of the context."""
    min_tokens: int = 0
    """No end of sequence, stop token or stop string before so many output tokens."""
    stop: str | list[str] | None = None
    """Text that ends the output; not part of it unless `include_stop_str_in_output`."""
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """Log-probabilities of each output token and of so many likeliest tokens, before any processing."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens but the first; such a request takes no prefix-cache hits."""
    skip_special_tokens: bool = True
    snapkv_limit: int | None = 0
    """Tokens of the prompt that keep their KV, where the engine prunes; 0: as many as the engine says; None: all."""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise UsageError(f"{name} must be {allowed}, not {getattr(self, name)!r}")

        for name, types in _types().items():
            check(
                isinstance(getattr(self, name), types),
                name,
                " or ".join(t.__name__ for t in types).replace("NoneType", "None"),
            )
        check(all(isinstance(stop, str) for stop in self.stop_strings), "stop", "one or more non-empty strings")
        check(all(isinstance(i, int) for i in self.stop_token_ids), "stop_token_ids", "a list of token ids")
        check(1 <= self.n <= 128, "n", "1 to 128")
        check(0 <= self.temperature <= 100, "temperature", "0 to 100")
        check(0 < self.top_p <= 1, "top_p", "over 0 and at most 1")
        check(self.top_k >= -1, "top_k", "-1 or 0 (all), or a positive number of tokens")
        check(0 <= self.min_p <= 1, "min_p", "0 to 1")
        check(0 < self.repetition_penalty <= 100, "repetition_penalty", "over 0 and at most 100")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "-2 to 2")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "-2 to 2")
        check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1, or None")
        check(self.min_tokens >= 0, "min_tokens", "at least 0")
        check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"at most max_tokens ({self.max_tokens})",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= MAX_LOGPROBS, name, f"0 to {MAX_LOGPROBS}, or None")
        check(self.snapkv_limit is None or self.snapkv_limit >= 0, "snapkv_limit", "at least 0, or None")
        check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer, or None")
        check(all(self.stop_strings), "stop", "one or more non-empty strings")
        bias = self.logit_bias or {}
        biases_are_valid = all(
            isinstance(k, int) and isinstance(v, int | float) and -100 <= v <= 100 for k, v in bias.items()
        )
        check(biases_are_valid, "logit_bias", "a map of token ids to values -100 to 100")

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


@cache
def _types() -> dict[str, tuple[type, ...]]:
    """By field, the types that its value may have; integers are numbers too."""
    allowed = {}
    for field in msgspec.structs.fields(SamplingParams):
        parts = get_args(field.type) if get_origin(field.type) is UnionType else (field.type,)
        types = [get_origin(part) or part for part in parts]
        allowed[field.name] = (*types, int) if float in types else tuple(types)
    return allowed
