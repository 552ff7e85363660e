"""Incremental detokenisation against the whole text, and the tokenizer's edges."""

import random
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayllm.checkpoint.gguf import converted
from rayllm.errors import UsageError
from rayllm.frontend.tokenizer import Detokenizer, Tokenizer

NUM_IDS = 49152
TEXT = "naïve 日本語 👩‍👩‍👧 \ufffd 🇫🇷 ok"


@pytest.fixture(scope="module")
def byte_level(smollm2):
    return Tokenizer.from_source(smollm2)


@pytest.fixture(scope="module")
def byte_fallback():
    """As of Llama 2: pieces with ▁ for a space; ids 3 to 258 are the bytes."""
    pieces = ["▁", "▁Hello", "▁wor", "ld", "你", "é", "\ufffd", "▁\ufffd", "▁▁", "."]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    model = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True)
    backend = BackendTokenizer(model)
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def in_pieces(tokenizer, ids, sizes, skip_special_tokens):
    """What add returned for each piece of `ids`, and what flush returned; `sizes` repeat."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    texts, start, turn = [], 0, 0
    while start < len(ids):
        stop = start + sizes[turn % len(sizes)]
        texts.append(detokenizer.add(ids[start:stop]))
        start, turn = stop, turn + 1
    return texts, detokenizer.flush()


ids_near = st.one_of(st.integers(0, 300), st.integers(0, NUM_IDS + 1000))
sizes = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.lists(ids_near, max_size=60), sizes, st.booleans())
def test_any_ids_of_a_byte_level_tokenizer(byte_level, ids, sizes, skip):
    texts, rest = in_pieces(byte_level, ids, sizes, skip)
    assert "".join(texts) + rest == byte_level.decode(ids, skip)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 275), st.integers(195, 245)), max_size=40), sizes, st.booleans())
@example([3 + 0xE4, 3 + 0xBD, 3 + 0xA0, 3 + 0xFF], [1], True)  # the fourth byte spoils a whole character
@example([259, 259, 260], [1], True)  # the text begins with the second space
def test_any_ids_of_a_byte_fallback_tokenizer(byte_fallback, ids, sizes, skip):
    texts, rest = in_pieces(byte_fallback, ids, sizes, skip)
    assert "".join(texts) + rest == byte_fallback.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), sizes)
@example(TEXT, [1])
def test_no_character_is_broken(byte_level, text, sizes):
    ids = byte_level.encode(text, add_special_tokens=False)
    text = byte_level.decode(ids, skip_special_tokens=False)  # the vocabulary lacks a few control characters
    texts, rest = in_pieces(byte_level, ids, sizes, False)
    assert "".join(texts) + rest == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(texts)
        assert rest == ""


def test_text_comes_as_soon_as_it_is_whole(byte_level, byte_fallback):
    words = byte_level.encode("The quick brown fox", add_special_tokens=False)
    texts, rest = in_pieces(byte_level, words, [1], True)
    assert all(texts)
    assert rest == ""

    emoji = [3 + byte for byte in "😀".encode()]
    texts, rest = in_pieces(byte_fallback, [260, *emoji, 262], [1], True)
    assert texts == ["Hello", "", "", "", "", "😀ld"]
    assert rest == ""


def test_byte_by_byte(byte_level, byte_fallback):
    """A text spelled in single bytes, one of them lost, with something in between."""
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for _ in range(100):
        lost = random.randrange(len(TEXT.encode()))
        data = [byte for i, byte in enumerate(TEXT.encode()) if i != lost]
        spelled = spelling.pre_tokenize_str(TEXT)[0][0]
        level = [byte_level.backend.token_to_id(c) for i, c in enumerate(spelled) if i != lost]
        for tokenizer, ids in (byte_level, level), (byte_fallback, [3 + byte for byte in data]):
            ids.insert(random.randrange(len(ids)), random.choice([0, 1, 262, 99999]))
            texts, rest = in_pieces(tokenizer, ids, [random.randint(1, 3)], True)
            assert "".join(texts) + rest == tokenizer.decode(ids)


def test_special_tokens(byte_level):
    end = byte_level.eos_token_ids[0]
    ids = [*byte_level.encode("one"), end, *byte_level.encode("two")]
    assert byte_level.decode(ids) == "onetwo"
    assert byte_level.decode(ids, skip_special_tokens=False) == "one<|im_end|>two"


def test_chat_template(byte_level, byte_fallback):
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    text = byte_level.decode(byte_level.apply_chat_template(messages), skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n")
    ids = byte_level.apply_chat_template(messages, add_generation_prompt=False)
    assert byte_level.decode(ids, skip_special_tokens=False).endswith("<|im_end|>\n")
    with pytest.raises(UsageError, match="no chat template"):
        byte_fallback.apply_chat_template(messages)
    with pytest.raises(UsageError, match="wants a user"):
        byte_fallback.apply_chat_template(messages, chat_template="{{ raise_exception('wants a user') }}")
    ids = byte_fallback.apply_chat_template(messages, chat_template="{{ messages[0].role }}.")
    assert byte_fallback.decode(ids) == "user."


def test_a_gguf_file_needs_no_torch(smollm2):
    """And gives what transformers finds for itself."""
    code = (
        "import sys; from rayllm.frontend.tokenizer import Tokenizer; "
        "tokenizer = Tokenizer.from_source(sys.argv[1]); assert 'torch' not in sys.modules; "
        "print(tokenizer.backend.to_str(), tokenizer._hf.chat_template, end='')"
    )
    done = subprocess.run([sys.executable, "-c", code, smollm2], capture_output=True, text=True, check=True, timeout=60)
    expected = AutoTokenizer.from_pretrained(converted(smollm2))
    assert done.stdout == f"{expected.backend_tokenizer.to_str()} {expected.chat_template}"


def test_sources(byte_level, tmp_path):
    assert byte_level.vocab_size == NUM_IDS
    byte_level._hf.save_pretrained(tmp_path)
    again = Tokenizer.from_source(tmp_path)
    assert again.encode(TEXT) == byte_level.encode(TEXT)
    assert again.eos_token_ids == (2,)
    with pytest.raises(UsageError, match="no tokenizer at"):
        Tokenizer.from_source(tmp_path / "nothing")
