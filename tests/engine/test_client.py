"""A client whose engines die on it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rayllm import SamplingParams
from rayllm.config import EngineArgs
from rayllm.errors import EngineDeadError
from rayllm.frontend.client import MAX_DEATHS, Client
from rayllm.messages.base import BYTES_PER_ID
from rayllm.messages.sequences import NewSequence, SequenceUpdate, Updates
from rayllm.messages.transport import Address, Sender
from rayllm.models.config_json import read_config

LENGTH = 3 * MAX_DEATHS
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
MODEL = read_config({"model_type": "llama", "vocab_size": 100, "num_hidden_layers": 1, **SIZES})


class DyingLink:
    """To engines that die on every sequence, after a token if they are `useful`; the last token ends the answer."""

    def __init__(self, is_useful: bool):
        self.is_useful = is_useful
        self.num_tokens: list[int] = []
        """That each engine found there."""

    async def answer(self, client: Address, sequence: NewSequence) -> None:
        num_tokens = len(sequence.token_ids) // BYTES_PER_ID - sequence.num_prompt_tokens
        self.num_tokens.append(num_tokens)
        await asyncio.sleep(0)
        is_last = num_tokens + 1 == LENGTH
        if self.is_useful:
            update = SequenceUpdate(sequence.sequence_id, [num_tokens], "length" if is_last else None)
            sender = Sender(client.local)
            sender.send(Updates(0, [update]))
            sender.close(linger_s=1)
            await asyncio.sleep(0.05)
        if not (self.is_useful and is_last):
            raise EngineDeadError(f"engine {len(self.num_tokens)} died")

    async def recover(self) -> bool:
        return True


async def answer(link: DyingLink) -> list[int]:
    client = Client(link, EngineArgs(model="any").resolve(MODEL, "cpu"), MODEL, tokenizer=None)
    token_ids: list[int] = []
    try:
        async for increment in client.answer([[1, 2, 3]], SamplingParams(max_tokens=LENGTH)):
            token_ids += increment.token_ids
    finally:
        client.close()
    return token_ids


def run(link: DyingLink) -> Any:
    return asyncio.run(asyncio.wait_for(answer(link), 60))


def test_a_request_that_kills_engines_is_given_up(ray_cluster: str):
    link = DyingLink(is_useful=False)
    with pytest.raises(EngineDeadError, match=f"engine {MAX_DEATHS} died"):
        run(link)
    assert link.num_tokens == [0] * MAX_DEATHS


def test_an_answer_that_goes_on_survives_any_number_of_deaths(ray_cluster: str):
    link = DyingLink(is_useful=True)
    assert run(link) == link.num_tokens == list(range(LENGTH))
