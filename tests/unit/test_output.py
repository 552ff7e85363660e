"""Choice against the whole text: however updates come in, what comes out is the same."""

from __future__ import annotations

import os
import tempfile

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rayllm.frontend.output import Choice, Increment
from rayllm.frontend.tokenizer import Tokenizer as RayllmTokenizer
from rayllm.messages.sequences import SequenceUpdate
from rayllm.messages.step import Logprobs
from rayllm.sampling_params import SamplingParams

PIECES = ["a", "b", "c", "ab", "bc", "aba", " a", "é", "😀"]
"""Their bytes are tokens too, so that stop strings and characters lie across tokens in every way."""


@pytest.fixture(scope="module")
def tokenizer() -> RayllmTokenizer:
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = ["".join(word for word, _ in encode.pre_tokenize_str(piece)) for piece in PIECES]
    letters = sorted({letter for word in words for letter in word} - set(words))
    vocabulary = {word: i for i, word in enumerate(words + letters)}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = encode, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        return RayllmTokenizer.from_source(folder)


def updates_of(token_ids: list[int], finish_reason: str, stop_token_id: int | None) -> list[SequenceUpdate]:
    """One token each, as the driver sends them."""
    updates = [
        SequenceUpdate(7, [token_id], logprobs=[Logprobs([token_id], [-float(i)], 1)], num_cached_tokens=3)
        for i, token_id in enumerate(token_ids)
    ]
    last = SequenceUpdate(7, token_ids[-1:], finish_reason, stop_token_id, 3, logprobs=updates[-1].logprobs)
    return [*updates[:-1], last]


def certain(tokenizer: RayllmTokenizer, token_ids: list[int]) -> str:
    """The text that stays, whichever tokens come next."""
    spelled = [tokenizer.encode(char) for char in "é😀"]
    ends = [ids[k:] for ids in spelled for k in range(1, len(ids))] + [[i] for i in range(tokenizer.vocab_size - 1)]
    return os.path.commonprefix(  # noqa: RUF071  # they are texts
        [tokenizer.backend.decode(token_ids + end) for end in ends]
    )


def run(choice: Choice, updates: list[SequenceUpdate], sizes: list[int]) -> list[Increment]:
    """Hands `updates` in, so many at a time, until the choice says that it is finished."""
    increments: list[Increment] = []
    sizes = sizes + [1] * len(updates)
    while updates and not (increments and increments[-1].finish_reason):
        size = sizes.pop(0)
        for update in updates[:size]:
            choice.add(update)
        updates = updates[size:]
        if (increment := choice.take()) is not None:
            increments.append(increment)
    return increments


def expected_end(texts: list[str], stops: list[str], min_tokens: int) -> tuple[int, int, str] | None:
    """(tokens, where it begins in the text, itself) of the stop string that is complete first."""
    for k in range(max(1, min_tokens), len(texts)):
        old, text = texts[k - 1], texts[k]
        found = [
            (start + len(stop), start, stop)
            for stop in stops
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > len(old)
        ]
        if found:
            return k, *min(found)[1:]
    return None


@given(data=st.data())
def test_any_split_gives_the_same(tokenizer: RayllmTokenizer, data: st.DataObject):
    eos = tokenizer.vocab_size - 1
    token_ids = data.draw(st.lists(st.integers(0, eos - 1), min_size=1, max_size=12), "tokens")
    stops = data.draw(
        st.lists(st.sampled_from(["a", "b", "ab", "ba", "abab", "aab", "c a", "é", "b😀", "zz"]), max_size=3)
    )
    end = data.draw(st.sampled_from(["length", "eos", "stop token"]), "end")
    is_included = data.draw(st.booleans(), "include_stop_str_in_output")
    if end == "eos":
        token_ids.append(eos)
    params = SamplingParams(
        stop=stops,
        max_tokens=100,
        min_tokens=data.draw(st.sampled_from([0, 0, 2, 5]), "min_tokens"),
        stop_token_ids=token_ids[-1:] if end == "stop token" else [],
        include_stop_str_in_output=is_included,
    )

    # what the text is after each token: all that no later token can change, at the end all
    texts = [certain(tokenizer, token_ids[:k]) for k in range(len(token_ids))]
    offsets = [*map(len, texts)]
    is_hidden = end != "length" and not is_included
    texts.append(tokenizer.decode(token_ids[:-1] if is_hidden else token_ids))
    expected = expected_end(texts, stops, params.min_tokens)

    choice = Choice(1, [0] * 5, params, 0, tokenizer)
    updates = updates_of(token_ids, "length" if end == "length" else "stop", None if end == "length" else token_ids[-1])
    increments = run(choice, updates, data.draw(st.lists(st.integers(0, 4)), "sizes"))
    text = "".join(increment.text for increment in increments)
    last = increments[-1]
    if expected is not None:
        num_tokens, start, stop = expected
        assert text == texts[num_tokens][: start + len(stop) if is_included else start]
        assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    else:
        num_tokens = len(token_ids)
        assert text == texts[-1]
        assert last.finish_reason == ("length" if end == "length" else "stop")
        assert last.stop_reason == (token_ids[-1] if end == "stop token" else None)
    assert [token_id for increment in increments for token_id in increment.token_ids] == token_ids[:num_tokens]
    told = [i for i in range(num_tokens) if expected is None or offsets[i] < len(text)]
    entries = [entry for increment in increments for entry in increment.logprobs]
    assert [entry.logprobs for entry in entries] == [[-float(i)] for i in told]
    assert [offset for increment in increments for offset in increment.text_offsets] == [offsets[i] for i in told]
    assert all(not increment.finish_reason for increment in increments[:-1])
    assert {(i.index, i.num_prompt_tokens, i.num_cached_tokens) for i in increments} == {(1, 5, 3)}


@given(data=st.data())
def test_only_what_may_become_a_stop_string_is_held(tokenizer: RayllmTokenizer, data: st.DataObject):
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 2), max_size=12))
    stops = data.draw(st.lists(st.sampled_from(["abz", "baaz", "bz", "😀z"]), max_size=2))  # never complete
    choice = Choice(0, [0], SamplingParams(stop=stops), 0, tokenizer)
    sent = ""
    for k, token_id in enumerate(token_ids, start=1):
        choice.add(SequenceUpdate(0, [token_id]))
        increment = choice.take()
        assert increment is not None
        sent += increment.text
        known = certain(tokenizer, token_ids[:k])
        beginnings = {stop[:n] for stop in stops for n in range(1, len(stop)) if known.endswith(stop[:n])}
        assert sent == known[: len(known) - max(map(len, beginnings), default=0)]
    assert choice.take() is None


def test_without_a_tokenizer():
    choice = Choice(0, [0], SamplingParams(stop_token_ids=[5]), 0, None)
    for update in updates_of([3, 4, 5], "stop", 5):
        choice.add(update)
    assert choice.token_ids == [3, 4, 5]
    increment = choice.take()
    assert increment is not None
    assert (increment.text, increment.token_ids, increment.finish_reason) == ("", [3, 4, 5], "stop")
    assert increment.stop_reason == 5


def test_prompt_logprobs_come_first():
    entries = [Logprobs([1], [-0.5], 1), Logprobs([2], [-1.5], 3)]
    choice = Choice(0, [0] * 3, SamplingParams(prompt_logprobs=0), 0, None)
    choice.add(SequenceUpdate(0, [4], prompt_logprobs=entries))
    choice.add(SequenceUpdate(0, [5]))
    increment = choice.take()
    assert increment is not None
    assert (increment.prompt_logprobs, increment.token_ids) == (entries, [4, 5])
