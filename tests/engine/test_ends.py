"""What ends an answer: ids of config.json, generation_config.json and the tokenizer, and none that is no token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayllm import LLM, SamplingParams
from rayllm.checkpoint.gguf import converted

VOCABULARY = 49152
OF_CONFIG, OF_GENERATION_CONFIG, OF_TOKENIZER = 2, 5, 7
WRONG = [50000, VOCABULARY, -1, 2.0, "2", True, [2], None]


@pytest.fixture(scope="module")
def llm(engine_pool, tiny_text_model: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """An engine whose files name an end each, beside all that is none."""
    folder = tmp_path_factory.mktemp("ends")
    shutil.copytree(tiny_text_model, folder, dirs_exist_ok=True)
    shutil.copy(converted(smollm2) / "tokenizer.json", folder)
    token = json.loads((folder / "tokenizer.json").read_text())["added_tokens"][OF_TOKENIZER]["content"]
    config = json.loads((folder / "config.json").read_text())
    for name, content in (
        ("config.json", config | {"eos_token_id": [OF_CONFIG, *WRONG]}),
        ("generation_config.json", {"eos_token_id": [*WRONG, OF_GENERATION_CONFIG]}),
        ("tokenizer_config.json", {"eos_token": token}),
    ):
        (folder / name).write_text(json.dumps(content))
    engine_pool.make_room(1)
    with LLM(str(folder), device="cpu", max_model_len=64, block_size=16, progress=False) as llm:
        yield llm


def forced(llm: LLM, token_id: int, **params: int | bool) -> tuple[int, str]:
    """How many tokens the answer has, and why it ended, where that token is the likeliest."""
    own = SamplingParams(temperature=0, max_tokens=4, logit_bias={token_id: 100.0}, **params)
    [answer] = llm.generate(["a"], own, use_tqdm=False)
    return len(answer["token_ids"]), answer["finish_reason"]


def test_what_ends_an_answer(llm: LLM):
    for token_id in (OF_CONFIG, OF_GENERATION_CONFIG, OF_TOKENIZER):
        assert forced(llm, token_id) == (1, "stop")
        assert forced(llm, token_id, min_tokens=2) == (3, "stop")
        assert forced(llm, token_id, ignore_eos=True) == (4, "length")
    assert forced(llm, 6, min_tokens=1) == (4, "length")
    assert llm.async_llm.engine.trouble is None
