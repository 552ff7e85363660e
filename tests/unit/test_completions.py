"""The writer of completions: whatever was asked and however the tokens come, texts, tokens and places fit together."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from deployments.answers import Completion, CompletionLogprobs
from deployments.completions import CompletionWriter
from deployments.protocol import CompletionRequest
from rayllm.frontend.output import Choice
from rayllm.frontend.tokenizer import Tokenizer
from rayllm.messages.sequences import SequenceUpdate
from rayllm.messages.step import Logprobs
from rayllm.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def tokenizer(smollm2) -> Tokenizer:
    return Tokenizer.from_source(smollm2)


def answer(
    tokenizer: Tokenizer, given_prompt: Any, output: list[int], tops: list[list[int]], stream: bool, **fields: Any
) -> list[Completion]:
    """What a client gets for these tokens: one completion, or the events of a stream."""
    prompt = given_prompt if isinstance(given_prompt, list) else tokenizer.encode(given_prompt)
    request = CompletionRequest(model="m", prompt=given_prompt, logprobs=len(tops[0]), stream=stream, **fields)
    writer = CompletionWriter(request, "m", [prompt], tokenizer, "")
    choice = Choice(0, prompt, SamplingParams(stop=fields.get("stop")), 0, tokenizer)
    told = []
    for number, token_id in enumerate(output):
        top = tops[number % len(tops)]
        entry = Logprobs([token_id, *top], [-9.0, *(-float(i) for i in range(len(top)))], 1)
        prompts = [Logprobs([i, *tops[0]], [-1.0] * (1 + len(top)), 1) for i in prompt[1:]] if not number else []
        finish = "length" if number == len(output) - 1 else None
        choice.add(SequenceUpdate(0, [token_id], finish, logprobs=[entry], prompt_logprobs=prompts))
        if stream or finish:
            increment = choice.take()
            assert increment is not None
            told.append(increment)
            if increment.finish_reason:
                break
    if not stream:
        return [writer.whole(told)]  # type: ignore[list-item]
    return [chunk for increment in told for chunk in writer.chunks(increment)]  # type: ignore[misc]


def joined(completions: list[Completion]) -> tuple[str, CompletionLogprobs]:
    choices = [completion.choices[0] for completion in completions]
    found = [choice.logprobs for choice in choices if choice.logprobs is not None]
    assert len(found) == len(choices)
    columns = ([x for part in found for x in getattr(part, name)] for name in CompletionLogprobs.__struct_fields__)
    return "".join(choice.text for choice in choices), CompletionLogprobs(*columns)


ids = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 49151)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.one_of(ids, st.text(min_size=1, max_size=20), st.just("a<|im_start|>b")), output=ids, echo=st.booleans()
)
def test_texts_tokens_and_places_fit(tokenizer: Tokenizer, prompt: Any, output: list[int], echo: bool):
    if not isinstance(prompt, list) and not tokenizer.encode(prompt):
        return
    tops = [[5, 6, 7]]
    text, logprobs = joined(answer(tokenizer, prompt, output, tops, stream=False, echo=echo))
    assert joined(answer(tokenizer, prompt, output, tops, stream=True, echo=echo)) == (text, logprobs)
    prompt_ids = prompt if isinstance(prompt, list) else tokenizer.encode(prompt)
    token_ids = (prompt_ids if echo else []) + output
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(token_ids)
    if echo and isinstance(prompt, str):
        assert text.startswith(prompt), "as it was given"
    elif echo:
        before = tokenizer.detokenizer(skip_special_tokens=False).add(prompt)
        assert text.startswith(before)
    certain = tokenizer.detokenizer().add(prompt_ids)
    continued = text.removeprefix(prompt if isinstance(prompt, str) else before) if echo else text
    assert certain + continued == tokenizer.backend.decode(prompt_ids + output)
    offsets = [*logprobs.text_offset, len(text)]
    assert offsets == sorted(offsets)
    assert offsets[0] >= 0
    is_exact = not isinstance(prompt, str) or tokenizer.decode(prompt_ids, False) == prompt
    for token_id, token, start, end in zip(token_ids, logprobs.tokens, offsets, offsets[1:], strict=False):
        is_whole = not token.startswith("bytes:")
        previous = text[start:end].startswith("\ufffd")  # bytes before it stay without their character
        if is_exact and is_whole and not previous and token_id not in tokenizer.special_ids:
            assert text[start:].startswith(token)
        assert is_whole or bytes.fromhex(token[6:].replace("\\x", "")) == tokenizer.token_bytes(token_id)


def test_entries_that_spell_alike_stay(tokenizer: Tokenizer):
    """Two parts of characters, a special token and its text, and the sampled token, likely or not."""
    parts = [tokenizer.backend.token_to_id(char) for char in "ðŁĺ"]
    tops = [[*parts, 2, 5], [5, 2, *parts]]
    _, logprobs = joined(answer(tokenizer, [9], [5, 6], tops, stream=False))
    first, second = logprobs.top_logprobs
    assert first is not None and second is not None
    assert list(first) == [tokenizer.token_text(5), "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "<|im_end|>"]
    assert next(iter(second)) == tokenizer.token_text(6)
    assert len(second) == 6
    assert [max(first, key=first.__getitem__), logprobs.tokens[0]] == ["bytes:\\xf0", tokenizer.token_text(5)]


def test_tokens_of_a_stop_string_are_not_told(tokenizer: Tokenizer):
    """But those whose text is in the answer are, and each event tells those of its own text."""
    output = tokenizer.encode("one two three four five")
    for stop, kept in ((" three", 2), ("hree f", 3), ("o three four", 2), ("one", 0)):
        for stream in (False, True):
            answered = answer(tokenizer, [9], output, [[5]], stream=stream, stop=stop)
            text, logprobs = joined(answered)
            assert text == "one two three four five".partition(stop)[0]
            assert len(logprobs.tokens) == kept
            assert "".join(logprobs.tokens).startswith(text)
