"""Files of .gguf: what of their metadata is honoured and what refused, tokenizers as llama.cpp reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_testing import BPE, CONTROL, FIRST_LETTER, LETTERS, MODEL, NORMAL, SENTENCEPIECE, USER_DEFINED, write
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from rayllm.checkpoint.gguf import converted
from rayllm.checkpoint.gguf_splits import SPLITS
from rayllm.checkpoint.sources import resolve_model
from rayllm.errors import UsageError
from rayllm.frontend.tokenizer import Tokenizer


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def tokenizer_of(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_source(write(folder / "model.gguf", MODEL | metadata))


def refusal(folder: Path, metadata: dict[str, Any]) -> str:
    """The one line with which a file is refused; it names the file."""
    with pytest.raises(UsageError) as refused:
        tokenizer_of(folder, metadata)
    line = str(refused.value)
    assert line.startswith(str(folder / "model.gguf"))
    assert "\n" not in line
    return line


TEXT = "It'S  12345!\n\n fooBar/日本"
TEXT_IN_WORDS = {
    "It|'|S| | |123|45|!|\n\n| fooBar|/|日本": "default falcon",
    "It|'|S| | 12345|!|\n\n| fooBar|/|日本": "gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-code jina-v2-de "
    "jina-v2-es gigachat roberta-bpe a.x-4.0 mellum modern-bert jais trillion granite-docling exaone4 mpt olmo",
    "It|'|S|  |1|2|3|4|5|!|\n\n| fooBar|/|日本": "smollm starcoder refact codeshell exaone minerva-7b mellum2 "
    "command-r",
    "It|'S| | |123|45|!\n\n| fooBar|/日本": "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 "
    "jina-v5-nano dbrx smaug-bpe chatglm-bpe glm4 glm5 jais-2",
    "It|'S|  |123|45|!\n\n| fooBar|/日本": "minicpm5",
    "It|'S| | |1|2|3|4|5|!\n\n| fooBar|/日本": "qwen2 deepseek-r1-qwen f2llmv2 kormo megrez stablelm2 hunyuan "
    "solar-open grok-2 qwen35 ufakzeka bailingmoe bailingmoe2 llada-moe",
    "It|'S| | |1|2|3|4|5|!|\n\n| fooBar|/日本": "laguna seed-coder",
    "It|'S| | |1|2|3|4|5|!\n|\n| fooBar|/日本": "exaone-moe",
    "It|'S| | |1|2|3|4|5|!\n\n| foo|Bar|/日本": "tekken",
    "It'S| | |123|45|!\n\n| foo|Bar|/日本": "gpt-4o llama4 kanana2 talkie minimax-m2 granite-embed-multi-97m",
    "It'S|  |12|345|!\n\n| foo|Bar|/日本": "tiny_aya cohere2moe",
    "It'S| | |1|2|3|4|5|!\n\n| foo|Bar|/|日本": "youtu",
    "It|'|S|  |12345|!|\n|\n| fooBar|/|日本": "deepseek-llm",
    "It|'|S|  |1|2|3|4|5|!|\n|\n| fooBar|/|日本": "deepseek-coder chameleon",
    "It|'S|  |123|45|!\n\n| fooBar|/|日本": "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    "It|'S|  |1|2|3|4|5|!|\n|\n| fooBar|/|日本": "spark2_5",
    "It'S| | 12345|!\n\n| fooBar/日本": "bloom gpt3-finnish poro-chat",
    "It'S| | |1|2|3|4|5|!\n\n| fooBar/日本": "viking",
    "It'S  |12|345|!\n\n fooBar/日本": "superbpe",
}


def test_every_name_of_a_splitter(tmp_path: Path) -> None:
    """The words are llama.cpp's; the text tells all rules apart but few."""
    words_of = {name: words for words, names in TEXT_IN_WORDS.items() for name in names.split()}
    assert words_of.keys() == SPLITS.keys()
    for name, words in words_of.items():
        backend = tokenizer_of(tmp_path, BPE | {"tokenizer.ggml.pre": name}).backend
        cuts = [cut for _, cut in backend.pre_tokenizer.pre_tokenize_str(TEXT)]
        assert "|".join(TEXT[start:end] for start, end in cuts) == words, name
        assert isinstance(backend.pre_tokenizer[len(SPLITS[name].patterns)], pre_tokenizers.ByteLevel)


@pytest.mark.parametrize("name", ["gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace", "kimi-k2", "afmoe"])
def test_splitters_that_are_refused(tmp_path: Path, name: str) -> None:
    line = refusal(tmp_path, BPE | {"tokenizer.ggml.pre": name})
    assert f"tokenizer.ggml.pre {name!r} is not supported" in line


def test_no_name_of_a_splitter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is llama.cpp's default, which is not silent."""
    named = tokenizer_of(tmp_path, BPE | {"tokenizer.ggml.pre": "default"})
    assert not caplog.messages
    tokenizer = tokenizer_of(tmp_path, BPE | {"tokenizer.ggml.pre": None})
    assert tokenizer.backend.to_str() == named.backend.to_str()
    assert "lacks tokenizer.ggml.pre" in caplog.text


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "plamo2", "gemma4", "hybriddna", "none", ""])
def test_tokenizers_that_are_refused(tmp_path: Path, kind: str) -> None:
    assert f"tokenizer.ggml.model {kind!r} is not supported" in refusal(tmp_path, BPE | {"tokenizer.ggml.model": kind})


def test_words_that_are_tokens(tmp_path: Path) -> None:
    """Merges do not lead to 'Ġthe' here, but some models take words that are tokens as they are."""
    merges = {"tokenizer.ggml.merges": ["h e", "Ġ t"]}
    by_merges = tokenizer_of(tmp_path, BPE | merges | {"tokenizer.ggml.pre": "dbrx"})
    whole = tokenizer_of(tmp_path, BPE | merges | {"tokenizer.ggml.pre": "glm4"})
    assert [by_merges.token_text(i) for i in by_merges.encode(" the")] == [" t", "he"]
    assert [whole.token_text(i) for i in whole.encode(" the")] == [" the"]


def test_composed_characters(tmp_path: Path) -> None:
    decomposed = "e\u0301"
    for name, text in [("qwen2", "é"), ("command-r", "é"), ("llama-bpe", decomposed), ("smollm", decomposed)]:
        tokenizer = tokenizer_of(tmp_path, BPE | {"tokenizer.ggml.pre": name})
        assert tokenizer.decode(tokenizer.encode(decomposed)) == text


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(SPLITS)), text=st.text(max_size=40))
def test_text_comes_back(tmp_path_factory: pytest.TempPathFactory, name: str, text: str) -> None:
    tokenizer = CACHED.get(name)
    if tokenizer is None:
        tokenizer = CACHED[name] = tokenizer_of(tmp_path_factory.mktemp("bpe"), BPE | {"tokenizer.ggml.pre": name})
    again = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)
    assert SPLITS[name].nfc or again == text


CACHED: dict[str, Tokenizer] = {}


@pytest.mark.parametrize(
    ("changes", "first", "last"),
    [
        ({}, None, None),
        ({"tokenizer.ggml.pre": "llama-bpe"}, 0, None),
        ({"tokenizer.ggml.pre": "tekken"}, 0, None),
        ({"tokenizer.ggml.pre": "chameleon"}, 0, None),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, None, None),
        ({"tokenizer.ggml.add_bos_token": True}, 0, None),
        ({"tokenizer.ggml.add_eos_token": True}, None, 1),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_eos_token": True}, 0, 1),
        (SENTENCEPIECE, 1, None),
        (SENTENCEPIECE | {"tokenizer.ggml.add_bos_token": False}, None, None),
        (SENTENCEPIECE | {"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.add_eos_token": True}, 2, 2),
    ],
)
def test_tokens_around_a_text(tmp_path: Path, changes: dict[str, Any], first: int | None, last: int | None) -> None:
    tokenizer = tokenizer_of(tmp_path, changes if "tokenizer.ggml.model" in changes else BPE | changes)
    before, after = ([] if end is None else [end] for end in (first, last))
    assert tokenizer.encode("lead") == [*before, *tokenizer.encode("lead", add_special_tokens=False), *after]
    assert tokenizer.encode("") == [*before, *after]


def test_special_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, BPE)
    ids = tokenizer.encode("<|bos|>[think]0<|eos|>")
    assert ids == [0, 2, FIRST_LETTER + LETTERS.index("0"), 1]
    assert tokenizer.decode(ids) == "[think]0"
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer._hf.bos_token == "<|bos|>"
    assert tokenizer._hf.chat_template == BPE["tokenizer.chat_template"]
    assert resolve_model(str(tmp_path / "model.gguf")).config.eos_token_ids == (1,)


def test_ends_of_turns_are_control_tokens(tmp_path: Path) -> None:
    """Even where a file says that they are text."""
    changes = {"tokenizer.ggml.tokens": ["<|im_end|>", *BPE["tokenizer.ggml.tokens"][1:]]}
    for kind in (NORMAL, USER_DEFINED, CONTROL):
        kinds = {"tokenizer.ggml.token_type": [kind, *BPE["tokenizer.ggml.token_type"][1:]]}
        tokenizer = tokenizer_of(tmp_path, BPE | changes | kinds | {"tokenizer.ggml.bos_token_id": None})
        assert tokenizer.encode("<|im_end|>") == [0]
        assert tokenizer.decode([0, FIRST_LETTER]) == LETTERS[0]


def test_answers_end_with_more_than_the_eos_token(tmp_path: Path) -> None:
    """As where a text's end is named, but turns end with another token."""
    tokens = ["<|im_end|>", "<|eos|>", "[think]", "<|eom_id|>", "</s>", "<eos>", *BPE["tokenizer.ggml.tokens"][6:]]
    kinds = [CONTROL, CONTROL, USER_DEFINED, NORMAL, CONTROL, NORMAL, *BPE["tokenizer.ggml.token_type"][6:]]
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    for more, ends in (({}, (1, 0, 3, 4)), ({"eot": 9, "eom": 9999}, (1, 0, 3, 4, 9)), ({"eos": 9999}, (0, 3, 4))):
        named = {f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in more.items()}
        file = write(tmp_path / "model.gguf", MODEL | BPE | changes | named)
        assert resolve_model(str(file)).config.eos_token_ids == ends


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Tokenizer]:
    """By whether a space is put before a text."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    without = SENTENCEPIECE | {"tokenizer.ggml.add_space_prefix": False}
    return {True: tokenizer_of(folder, SENTENCEPIECE), False: tokenizer_of(folder, without)}


@pytest.mark.parametrize(
    ("text", "with_prefix", "without"),
    [
        ("lead", ["▁lead"], ["lead"]),
        (" lead", ["▁▁", "lead"], ["▁lead"]),
        ("     lead", ["▁▁▁▁", "▁▁", "lead"], ["▁▁▁▁", "▁lead"]),
        ("é", ["▁", "<0xC3>", "<0xA9>"], ["<0xC3>", "<0xA9>"]),
        ("a[tool] lead", ["▁", "a", "[tool]", "▁▁", "lead"], ["a", "[tool]", "▁lead"]),
        ("</s>lead", ["</s>", "▁lead"], ["</s>", "lead"]),
        ("", [], []),
    ],
)
def test_sentencepiece(
    sentencepiece: dict[bool, Tokenizer], text: str, with_prefix: list[str], without: list[str]
) -> None:
    """As llama.cpp: a piece of text after a special token begins with a space, too."""
    for prefix, pieces in [(True, with_prefix), (False, without)]:
        backend = sentencepiece[prefix].backend
        assert backend.encode(text, add_special_tokens=False).tokens == pieces


def test_blanks_after_special_tokens_of_phi3(tmp_path: Path) -> None:
    """They do not count, but after three of those tokens."""
    tokenizer = tokenizer_of(tmp_path, SENTENCEPIECE | {"general.name": "Phi-3 mini"})
    pieces = ["<s>", "<s>", "▁▁", "lead", "</s>", "▁lead"]
    assert tokenizer.encode("<s> lead</s> \nlead") == [tokenizer.backend.token_to_id(piece) for piece in pieces]


@settings(max_examples=200, deadline=None)
@given(st.booleans(), st.text(st.sampled_from(" leadé日\n!\t\0"), max_size=20))
def test_sentencepiece_gives_the_text_back(sentencepiece: dict[bool, Tokenizer], prefix: bool, text: str) -> None:
    tokenizer = sentencepiece[prefix]
    assert tokenizer.decode(tokenizer.encode(text)) == text


TOKENS = BPE["tokenizer.ggml.tokens"]
assert isinstance(TOKENS, list)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.tokens": None}, "lacks tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": [7] * len(TOKENS)}, "tokenizer.ggml.tokens must be an array, each entry a string"),
        ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}, "tokenizer.ggml.tokens has 'a' twice"),
        ({"tokenizer.ggml.token_type": [1]}, f"tokenizer.ggml.token_type has 1 entries for {len(TOKENS)} tokens"),
        ({"tokenizer.ggml.token_type": ["1"] * len(TOKENS)}, "tokenizer.ggml.token_type must be an array"),
        ({"tokenizer.ggml.merges": None}, "lacks tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["he"]}, "tokenizer.ggml.merges has 'he'"),
        ({"tokenizer.ggml.merges": ["h ee"]}, "tokenizer.ggml.merges has 'h ee'"),
        ({"tokenizer.ggml.merges": ["0 1"]}, "tokenizer.ggml.merges has '0 1'"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token must be true or false, not 'yes'"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
            "tokenizer.ggml.bos_token_id must",
        ),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 9999},
            "tokenizer.ggml.bos_token_id must",
        ),
        ({"tokenizer.chat_template": ["a"]}, "tokenizer.chat_template must be a string, not an array of 1"),
        ({"tokenizer.ggml.model": "llama"}, "lacks tokenizer.ggml.scores"),
        (SENTENCEPIECE | {"tokenizer.ggml.scores": [0.0] * 273}, "tokenizer.ggml.scores are all alike"),
        (
            SENTENCEPIECE | {"tokenizer.ggml.scores": [float("nan")] * 273},
            "tokenizer.ggml.scores must be finite numbers",
        ),
        (SENTENCEPIECE | {"tokenizer.ggml.scores": [0.0]}, "tokenizer.ggml.scores has 1 entries for 273 tokens"),
        (SENTENCEPIECE | {"tokenizer.ggml.add_space_prefix": "no"}, "tokenizer.ggml.add_space_prefix must be true or"),
        ({"general.architecture": None}, "lacks general.architecture"),
        ({"llama.block_count": "2"}, "llama.block_count must be an integer, not '2'"),
        ({"llama.block_count": 2.0}, "llama.block_count must be an integer, not 2.0"),
        ({"llama.block_count": [2]}, "llama.block_count must be an integer, not an array of 1"),
        ({"llama.block_count": 0}, "llama.block_count must be positive, not 0"),
        ({"llama.block_count": 30}, "llama.block_count is 30, but there are only 7 tensors"),
        ({"llama.embedding_length": None}, "lacks llama.embedding_length"),
        ({"llama.embedding_length": 32}, "llama.embedding_length does not fit the tensor token_embd.weight"),
        (
            {"llama.attention.head_count": 2, "llama.attention.key_length": 4},
            "llama.attention.head_count or llama.attention.key_length",
        ),
        ({"llama.attention.head_count_kv": 4}, "llama.attention.head_count_kv or llama.attention.key_length"),
        ({"llama.feed_forward_length": 64}, "llama.feed_forward_length does not fit"),
        ({"llama.attention.head_count": [4, 8]}, "llama.attention.head_count must be one positive integer"),
        ({"llama.attention.head_count_kv": [2, 2, 2]}, "llama.attention.head_count_kv must be one positive integer"),
        ({"llama.feed_forward_length": ["32", "32"]}, "llama.feed_forward_length must be one positive integer"),
        ({"llama.attention.layer_norm_rms_epsilon": True}, "layer_norm_rms_epsilon must be a number, not True"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon must be a number, not nan"),
        ({"llama.rope.dimension_count": 2}, "llama.rope.dimension_count must be 4"),
        ({"llama.expert_count": 8}, "llama.expert_count is not 0"),
        ({"llama.attention.head_count_kv": 3}, "llama.attention.head_count_kv or llama.attention.key_length"),
        ({"general.architecture": "gpt2"}, "general.architecture 'gpt2' is not supported: rayllm runs llama, qwen2"),
        ({"llama.rope.scaling.type": 3}, "llama.rope.scaling.type must be a string, not 3"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type 'longrope' is not supported"),
        ({"llama.rope.scaling.factor": 0.5}, "llama.rope.scaling.factor must be at least 1"),
        ({"llama.rope.scaling.factor": -1.0}, "llama.rope.scaling.factor must be positive"),
        ({"split.count": "3"}, "split.count must be an integer"),
        ({"split.count": 3}, "lacks split.no"),
    ],
)
def test_metadata_that_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in refusal(tmp_path, BPE | changes)


def test_a_vocabulary_without_a_model(tmp_path: Path) -> None:
    """It is a tokenizer, of whatever architecture."""
    file = write(tmp_path / "vocab.gguf", BPE | {"general.architecture": "falcon"}, num_tokens=0)
    whole = tokenizer_of(tmp_path, BPE)
    assert Tokenizer.from_source(file).backend.to_str() == whole.backend.to_str()
    with pytest.raises(UsageError, match=r"vocab.gguf is a vocabulary without a model"):
        resolve_model(str(file))


def test_vocabularies_of_another_size(tmp_path: Path) -> None:
    for num_tokens in (len(TOKENS) - 1, len(TOKENS) + 1):
        file = write(tmp_path / "model.gguf", MODEL | BPE, num_tokens)
        with pytest.raises(
            UsageError, match=rf"tokens has {len(TOKENS)} tokens, but token_embd.weight {num_tokens} rows"
        ):
            converted(file)


@pytest.mark.parametrize("base", [BPE, SENTENCEPIECE], ids=["bpe", "sentencepiece"])
def test_any_wrong_value_of_any_key(tmp_path: Path, base: dict[str, Any]) -> None:
    """It is left out or refused by the key's name, but nothing fails."""
    keys = [*MODEL, *base, "llama.rope.scaling.factor", "llama.attention.key_length", "tokenizer.ggml.add_bos_token"]
    for key in keys:
        for value in (None, "x", -1, (1 << 31) - 1, 0.5, True, [""], [-1, 3], [0.5]):
            file = write(tmp_path / "model.gguf", MODEL | base | {key: value}, len(base["tokenizer.ggml.tokens"]))
            try:
                Tokenizer.from_source(str(resolve_model(str(file)).tokenizer_path)).encode("lead")
            except UsageError as error:
                line = str(error)
                if "\n" in line or key not in line or str(file) not in line:
                    pytest.fail(f"{key} = {value!r}: {line}")


def test_what_stands_for_every_layer(tmp_path: Path) -> None:
    """One number for each layer is that number, and the older key of linear scaling is read."""
    changes = {
        "llama.attention.head_count": [4, 4],
        "llama.feed_forward_length": [32, 32],
        "llama.rope.scale_linear": 4.0,
    }
    config = resolve_model(str(write(tmp_path / "model.gguf", MODEL | BPE | changes))).config
    assert (config.num_attention_heads, config.intermediate_size) == (4, 32)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.rope_type, config.rope_scaling.factor) == ("linear", 4.0)
