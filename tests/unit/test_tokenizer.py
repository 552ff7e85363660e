"""Incremental detokenisation against the whole text, and the tokenizer's edges."""

import random
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayllm.checkpoint.gguf import converted
from rayllm.errors import UsageError
from rayllm.frontend.tokenizer import Tokenizer
from rayllm.sampling_params import SamplingParams

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


def in_pieces(detokenizer, ids, sizes):
    """What add returned for each piece of `ids`, and what flush returned; `sizes` repeat."""
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
    texts, rest = in_pieces(byte_level.detokenizer(skip), ids, sizes)
    assert "".join(texts) + rest == byte_level.backend.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 275), st.integers(195, 245)), max_size=40), sizes, st.booleans())
@example([3 + 0xE4, 3 + 0xBD, 3 + 0xA0, 3 + 0xFF], [1], True)  # the fourth byte spoils a whole character
@example([259, 259, 260], [1], True)  # the text begins with the second space
def test_any_ids_of_a_byte_fallback_tokenizer(byte_fallback, ids, sizes, skip):
    texts, rest = in_pieces(byte_fallback.detokenizer(skip), ids, sizes)
    assert "".join(texts) + rest == byte_fallback.backend.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), sizes)
@example(TEXT, [1])
def test_no_character_is_broken(byte_level, text, sizes):
    ids = byte_level.encode(text, add_special_tokens=False)
    text = byte_level.decode(ids, skip_special_tokens=False)  # the vocabulary lacks a few control characters
    texts, rest = in_pieces(byte_level.detokenizer(False), ids, sizes)
    assert "".join(texts) + rest == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(texts)
        assert rest == ""


def test_text_comes_as_soon_as_it_is_whole(byte_level, byte_fallback):
    words = byte_level.encode("The quick brown fox", add_special_tokens=False)
    texts, rest = in_pieces(byte_level.detokenizer(True), words, [1])
    assert all(texts)
    assert rest == ""

    emoji = [3 + byte for byte in "😀".encode()]
    texts, rest = in_pieces(byte_fallback.detokenizer(True), [260, *emoji, 262], [1])
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
            texts, rest = in_pieces(tokenizer.detokenizer(True), ids, [random.randint(1, 3)])
            assert "".join(texts) + rest == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # as llama.cpp and the model's own tokenizer.json have them
        ("Steps:\n\n1. Boil", [21831, 42, 1116, 33, 30, 4499, 301]),
        ("a  1", [81, 256, 33]),
        ("a   12\n 3", [81, 333, 33, 34, 3805, 35]),
        ("\t4", [197, 36]),
        ("x\n\n\n5", [104, 16506, 37]),
        ("It's  2026:\n\n\n 7 days", [1589, 506, 256, 34, 32, 34, 38, 42, 1116, 3805, 39, 2009]),
        ("<|im_start|>user\n\n1<|im_end|>", [1, 4093, 1116, 33, 2]),
    ],
)
def test_blanks_before_digits(byte_level, text, ids):
    assert byte_level.encode(text) == ids


def test_special_tokens(byte_level):
    end = byte_level.eos_token_ids[0]
    ids = [*byte_level.encode("one"), end, *byte_level.encode("two")]
    assert byte_level.decode(ids) == "onetwo"
    assert byte_level.decode(ids, skip_special_tokens=False) == "one<|im_end|>two"


KINDS = ["byte_level", "byte_fallback", "pieces", "metaspace", "wordpiece"]


@pytest.fixture(scope="module")
def pieces(byte_fallback):
    """As of Gemma: no space is put before a text, none is taken away."""
    backend = BackendTokenizer.from_str(byte_fallback.backend.to_str())
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.fixture(scope="module")
def metaspace(byte_fallback):
    backend = BackendTokenizer.from_str(byte_fallback.backend.to_str())
    backend.decoder = decoders.Metaspace()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.fixture(scope="module")
def wordpiece():
    """Whose decoder writes spaces between tokens, but not before a full stop."""
    words = ["[UNK]", "[CLS]", "the", "##m", "##\ufffd", ".", "do", "n't", "\ufffd"]
    backend = BackendTokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.add_special_tokens([AddedToken("[CLS]", special=True)])
    backend.decoder = decoders.WordPiece()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), skip=st.booleans())
def test_a_continuation_is_not_a_beginning(request, kind, data, skip):
    """Whatever the prompt, also one that ends within a character: its text and what follows are the text of all ids."""
    tokenizer = request.getfixturevalue(kind)
    ids = st.lists(st.integers(0, min(300, tokenizer.vocab_size)), max_size=40)
    prompt, output = data.draw(ids, "prompt"), data.draw(ids, "output")
    split = data.draw(sizes, "sizes")
    before = tokenizer.detokenizer(skip)
    shown = before.add(prompt)
    detokenizer = tokenizer.detokenizer(skip)
    detokenizer.begin(prompt)
    texts, rest = in_pieces(detokenizer, output, split)
    whole = tokenizer.backend.decode(prompt + output, skip_special_tokens=skip)
    assert shown + "".join(texts) + rest == whole


def test_a_word_after_a_prompt(byte_fallback):
    """A space that spells the beginning of a text is a space after another."""
    hello, world = [260], [261, 262]
    assert byte_fallback.decode(hello) == "Hello"
    assert byte_fallback.decode(world) == "world"
    detokenizer = byte_fallback.detokenizer()
    detokenizer.begin([1, *hello])
    assert detokenizer.add(world) == " world"


def test_a_character_that_the_prompt_began(byte_level, byte_fallback):
    for tokenizer, ids in (
        (byte_level, byte_level.encode("a😀")),
        (byte_fallback, [261, *(3 + b for b in "😀".encode())]),
    ):
        detokenizer = tokenizer.detokenizer()
        detokenizer.begin(ids[:3])
        assert detokenizer.add(ids[3:]) + detokenizer.flush() == "😀"


@pytest.mark.parametrize("kind", KINDS)
def test_the_work_is_linear(request, kind):
    """It is so for bytes that never make a character, for what has no text, and for what is in no vocabulary."""
    tokenizer = request.getfixturevalue(kind)
    byte = tokenizer.backend.token_to_id("<0x80>")
    if kind == "byte_level":
        byte = tokenizer.backend.token_to_id("Ģ")  # byte 0x80
    special = next(iter(tokenizer.special_ids))
    for repeated in filter(None, (byte, special, 10**6)):
        took = []
        for number in (4_000, 16_000):
            detokenizer = tokenizer.detokenizer()
            began = time.process_time()
            text = "".join(detokenizer.add([repeated]) for _ in range(number)) + detokenizer.flush()
            took.append(time.process_time() - began)
            assert text == tokenizer.backend.decode([repeated] * number)
        assert took[1] < 8 * took[0] + 0.05, "four times as many take about four times as long"


@pytest.fixture(scope="module")
def odd():
    """A byte-level vocabulary with entries that spell no bytes."""
    vocabulary = {"a": 0, "Ġb": 1, "漢": 2, "Ã": 3, "©": 4}
    backend = BackendTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<tool▁call>", special=True)])
    backend.add_tokens([AddedToken("▁x", special=False)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_what_a_token_is_as_text(odd, byte_fallback):
    texts = [odd.token_text(token_id) for token_id in range(8)]
    assert texts == ["a", " b", "漢", "\ufffd", "\ufffd", "<tool▁call>", "▁x", ""]
    assert odd.decode([0, 3, 4, 2, 5, 6], skip_special_tokens=False) == "aé漢<tool▁call>▁x"
    assert byte_fallback.token_text(260) == " Hello"
    assert byte_fallback.token_bytes(3 + 0xE4) == b"\xe4"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_least_tokens_are_no_more_than_there_are(byte_level, byte_fallback, text):
    for tokenizer in (byte_level, byte_fallback):
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))


def test_a_size_that_is_too_much(byte_level, byte_fallback, metaspace):
    assert byte_level.least_tokens("word " * 100_000) > 5_000
    assert byte_level.least_tokens("\x04" * 500_000) == 0, "it has no token"
    assert byte_fallback.least_tokens("word " * 100_000) > 50_000
    composed = BackendTokenizer.from_str(byte_level.backend.to_str())
    composed.normalizer = normalizers.NFC()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=composed))
    text = "\u1112\u1161\u11ab" * 1000  # three characters, 9 bytes, that are one of 3
    assert 0 < tokenizer.least_tokens(text) <= len(tokenizer.encode(text))


def test_half_a_surrogate_pair_is_no_text(byte_level):
    for text in ("\ud83d", "a\udfff", "\udc80"):
        with pytest.raises(UsageError, match="must be Unicode"):
            byte_level.encode(text)
        with pytest.raises(UsageError, match="stop must be Unicode"):
            SamplingParams(stop=["a", text])


def chat(tokenizer, messages, variables=None):
    return tokenizer.apply_chat_template(messages, variables)


def test_chat_template(byte_level, byte_fallback):
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    text = chat(byte_level, messages)
    assert text.endswith("<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n")
    assert chat(byte_level, messages, {"add_generation_prompt": False}).endswith("<|im_end|>\n")
    with pytest.raises(UsageError, match="no chat template"):
        chat(byte_fallback, messages)


@pytest.fixture
def templated(byte_fallback):
    """Renders messages with a template of one's own."""

    def render(template, messages, **variables):
        byte_fallback._hf.chat_template = template
        return chat(byte_fallback, messages, variables)

    yield render
    byte_fallback._hf.chat_template = None


ALL = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no such\\nthing') }}",
        "{{ messages[7].role }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing() }}",
        "{{ messages | first | items | sum }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__ }}{{ x.y.z }}",
        "{{ strftime_now(5) }}",
        "{% if %}",
    ],
)
def test_whatever_a_template_raises_is_one_line(templated, template):
    with pytest.raises(UsageError, match=r"^the chat template refuses these messages: \S[^\n]*$"):
        templated(template, [{"role": "user", "content": "a"}])


def test_developers_are_system_where_the_template_knows_no_other(templated):
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert templated(ALL, messages) == "system:be kind;user:hi;"
    knowing = "{% if messages[0].role == 'developer' %}D{% endif %}" + ALL
    assert templated(knowing, messages) == "Ddeveloper:be kind;user:hi;"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ f.arguments | tojson }}", '{"city": "Paris", "n": 2}'),
        ("{% for k, v in f.arguments.items() %}{{ k }}={{ v }};{% endfor %}", "city=Paris;n=2;"),
        ("{{ f.arguments is mapping }} {{ f.arguments.city }}", "True Paris"),
        ("{{ f.arguments }}", '{"city":"Paris", "n":2}'),
        ("{{ '<' + f.arguments + '>' }}", '<{"city":"Paris", "n":2}>'),
        ("{{ '<' ~ f.arguments ~ '>' }}", '<{"city":"Paris", "n":2}>'),
        ("{{ f.arguments if f.arguments is string else f.arguments | tojson }}", '{"city": "Paris", "n": 2}'),
    ],
)
def test_arguments_are_what_a_template_takes_them_for(templated, template, text):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city":"Paris", "n":2}'}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert templated("{% set f = messages[0].tool_calls[0].function %}" + template, messages) == text


@pytest.mark.parametrize("arguments", ["{}", "{", "[1]", '"a"', "[" * 5000])
def test_arguments_of_other_forms_stay(templated, arguments):
    """What a model wrote, and what is a mapping already."""
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    text = templated("{{ messages[0].tool_calls[0].function.arguments }}", messages)
    assert text == str(arguments)


def test_variables_cannot_hide_the_messages(templated):
    with pytest.raises(UsageError, match="refuses"):
        templated(ALL, [{"role": "user", "content": "a"}], conversation=[])


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
