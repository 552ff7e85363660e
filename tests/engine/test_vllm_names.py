"""What users of vLLM know of LLM: dicts as sampling params, `chat`, `get_tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from engine_testing import SMOLLM2, greedy, tokens_of

from rayllm import LLM, SamplingParams, UsageError
from rayllm.checkpoint.gguf import converted

PROMPT = "A short story about a fox and a river:\n"
HELLO = [{"role": "user", "content": "Hi!"}]
LONGER = [{"role": "system", "content": "You are brief."}, *HELLO, {"role": "assistant", "content": "Yes?"}, *HELLO]
OPEN = [*HELLO, {"role": "assistant", "content": "Once upon a"}]
SHOUT = "{% for message in messages %}{{ message.content | upper }}{{ end }}{% endfor %}"


@pytest.fixture
def llm(engines) -> LLM:
    return engines("smollm2", **SMOLLM2)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(converted(smollm2))


def test_dicts_are_sampling_params(llm: LLM):
    """One for all or one for each, among instances."""
    fields = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
    expected = tokens_of(llm.generate([PROMPT, HELLO], greedy(3), use_tqdm=False))
    assert tokens_of(llm.generate([PROMPT, HELLO], fields, use_tqdm=False)) == expected
    assert tokens_of(llm.generate([PROMPT, HELLO], (fields, greedy(3)), use_tqdm=False)) == expected
    assert [id for increment in llm.stream(PROMPT, fields) for id in increment.token_ids] == expected[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokns": 3}, "unknown sampling parameter max_tokns: did you mean max_tokens?"),
        ([{"max_tokens": 3}, {"temprature": 3}], "unknown sampling parameter temprature: did you mean temperature?"),
        ({"max_tokens": 0}, "max_tokens must be an integer, at least 1"),
        (3, "sampling params must be SamplingParams or a dict, not 3"),
        ([greedy(3), None, None], "3 sampling params for 2 prompts"),
        ([greedy(3), "a"], "sampling params must be SamplingParams or a dict, not 'a'"),
    ],
)
def test_what_are_no_sampling_params(llm: LLM, given: Any, message: str):
    with pytest.raises(UsageError, match=message):
        llm.generate([PROMPT] * 2, given, use_tqdm=False)
    with pytest.raises(UsageError, match=message):
        llm.chat([HELLO] * 2, given, use_tqdm=False)


@pytest.mark.parametrize(
    ("messages", "asked"),
    [
        (HELLO, {}),
        (LONGER, {"add_generation_prompt": False}),
        (OPEN, {"continue_final_message": True}),
        (OPEN, {"continue_final_message": True, "add_generation_prompt": False}),
        (LONGER, {"chat_template": SHOUT, "chat_template_kwargs": {"end": "!"}}),
        (HELLO, {"chat_template": "{{ tools[0].function.name }}:", "tools": [{"function": {"name": "weather"}}]}),
    ],
)
def test_chat(llm: LLM, tokenizer, messages: list[dict[str, Any]], asked: dict[str, Any]):
    """The prompt is the one that transformers makes."""
    given = {"add_generation_prompt": not asked.get("continue_final_message")} | asked
    given |= given.pop("chat_template_kwargs", {})
    ids = tokenizer.apply_chat_template(messages, **given)["input_ids"]
    [result] = llm.chat(messages, greedy(6), use_tqdm=False, **asked)
    assert [result["token_ids"]] == tokens_of(llm.generate([ids], greedy(6), use_tqdm=False))


def test_chat_of_many(llm: LLM):
    """In order, each with its own params."""
    conversations = [HELLO, LONGER, tuple(HELLO)]
    results = llm.chat(conversations, [greedy(4), greedy(6), greedy(5)], use_tqdm=False)
    expected = [llm.chat(messages, greedy(6), use_tqdm=False)[0]["token_ids"] for messages in conversations]
    assert tokens_of(results) == [ids[:n] for ids, n in zip(expected, (4, 6, 5), strict=True)]
    assert llm.chat([], use_tqdm=False) == []


@pytest.mark.parametrize(
    ("messages", "asked", "message"),
    [
        ("Hi!", {}, "messages must be a list of chat messages, or a list of such lists"),
        (HELLO[0], {}, "messages must be a list of chat messages"),
        (["Hi!"], {}, "messages must be a list of chat messages"),
        (OPEN, {"continue_final_message": True, "add_generation_prompt": True}, "the chat template refuses"),
        (
            [HELLO, [{"content": 3}]],
            {"chat_template": "{{ messages[0]['content'] + '' }}"},
            "the chat template refuses",
        ),
        (HELLO, {"chat_template_kwargs": {"tokenize": True}}, "the chat template refuses these messages: .*tokenize"),
    ],
)
def test_no_chat(llm: LLM, messages: Any, asked: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message) as refused:
        llm.chat(messages, greedy(4), use_tqdm=False, **asked)
    assert "\n" not in str(refused.value)


def test_tokenizer(llm: LLM, tokenizer):
    """It is transformers' own; what is done to it stays without effect on the engine."""
    own = llm.get_tokenizer()
    assert isinstance(own, transformers.PreTrainedTokenizerFast)
    assert own.eos_token_id == tokenizer.eos_token_id
    assert own.encode(PROMPT) == tokenizer.encode(PROMPT)
    assert own.apply_chat_template(HELLO, tokenize=False) == tokenizer.apply_chat_template(HELLO, tokenize=False)
    assert own is llm.get_tokenizer()
    before = tokens_of(llm.generate(PROMPT, greedy(3), use_tqdm=False))
    own([PROMPT, "a"], truncation=True, max_length=2, padding=True)
    own.chat_template = "{{ 'nothing' }}"
    assert tokens_of(llm.generate(PROMPT, greedy(3), use_tqdm=False)) == before
    assert tokens_of(llm.chat(HELLO, greedy(3), use_tqdm=False)) == tokens_of(
        llm.generate([HELLO], greedy(3), use_tqdm=False)
    )


def test_without_a_tokenizer(engines):
    llm = engines("llama", max_model_len=64, block_size=8, max_num_seqs=4)
    for ask in (llm.get_tokenizer, lambda: llm.chat(HELLO, SamplingParams())):
        with pytest.raises(UsageError, match="skip_tokenizer_init"):
            ask()
