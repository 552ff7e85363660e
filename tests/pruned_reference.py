"""SnapKV from its definition: transformers in float64, one sequence at a time."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

SINKS, POOL = 4, 15


class PrunedReference:
    """Greedy decoding over a pruned cache."""

    def __init__(self, folder: Path | str, window: int, device: str = "cpu"):
        auto = transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval().to(device)
        self.window = window
        self.device = device

    @torch.no_grad()
    def kept(self, prompt: list[int], limit: int, policy: str = "snapkv") -> list[list[list[int]]]:
        """By layer and KV head, the positions whose keys and values are kept."""
        length, num_heads = len(prompt), self.model.config.num_key_value_heads
        if policy == "streaming":
            positions = [*range(SINKS), *range(length - limit + SINKS, length)]
            return [[positions] * num_heads] * self.model.config.num_hidden_layers
        attentions = self.model(self._ids(prompt), output_attentions=True).attentions
        layers = []
        for weights in attentions:  # [1, query heads, queries, keys]
            columns = weights[0, :, -self.window :].sum(dim=1)
            heads = []
            for group in columns.chunk(num_heads):
                reach = POOL // 2
                pooled = [group[:, max(0, i - reach) : i + reach + 1].max().item() for i in range(length)]
                always = [*range(SINKS), *range(length - self.window, length)]
                rest = sorted(set(range(length)) - set(always), key=lambda i: (-pooled[i], i))
                heads.append(sorted(always + rest[: limit - len(always)]))
            layers.append(heads)
        return layers

    @torch.no_grad()
    def generate(self, prompt: list[int], limit: int, max_tokens: int, policy: str = "snapkv") -> list[int]:
        output = self.model(self._ids(prompt), use_cache=True)
        cache = output.past_key_values
        if len(prompt) > limit:
            for layer, heads in zip(cache.layers, self.kept(prompt, limit, policy), strict=True):
                index = self._ids(heads)[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
                layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        tokens = [int(output.logits[0, -1].argmax())]
        while len(tokens) < max_tokens:
            position = self._ids([len(prompt) + len(tokens) - 1])
            output = self.model(self._ids(tokens[-1:]), past_key_values=cache, position_ids=position)
            tokens.append(int(output.logits[0, -1].argmax()))
        return tokens

    def _ids(self, values: list) -> torch.Tensor:
        return torch.tensor([values], device=self.device)
