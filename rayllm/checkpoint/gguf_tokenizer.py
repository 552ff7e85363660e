"""The tokenizer of a .gguf file, as the files that transformers and tokenizers load."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rayllm.checkpoint.gguf_metadata import Metadata
from rayllm.checkpoint.gguf_splits import SPLITS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger("rayllm")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Values of `tokenizer.ggml.token_type`. All but the first are found in a text before it is cut into words."""
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""Token ids where a SentencePiece model's file does not say."""
TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>", "<|endoftext|>"),
    *("<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>"),
)
"""Tokens that are control tokens whatever type a file gives them, as in llama.cpp; some files give a wrong one."""
ENDS = (*TURN_ENDS, "[EOS]", "</s>", "<eos>")
"""Control tokens with which an answer ends, as in llama.cpp: files often name but one of theirs."""
PHI3_KEEP_BLANKS = ("<unk>", "<s>", "<|endoftext|>")
"""The special tokens of Phi-3 after which blanks count; files do not say so."""
BLANK = "\u2581"
"""How SentencePiece spells a space."""


def write_tokenizer(metadata: Metadata, folder: Path, num_embeddings: int | None = None) -> list[int]:
    """Writes tokenizer.json and tokenizer_config.json; returns the ids of tokens that end an answer.

    num_embeddings: how many tokens the model has, if there is a model.

    Raises UsageError, which names the key, for what would not give the ids that llama.cpp gives.
    """
    from tokenizers import AddedToken, processors

    tokens = _tokens(metadata, num_embeddings)
    num_tokens = len(tokens)
    kinds = metadata.array("tokenizer.ggml.token_type", int, num_tokens) or [NORMAL] * num_tokens
    kinds = [CONTROL if token in TURN_ENDS else kind for token, kind in zip(tokens, kinds, strict=True)]
    model = metadata.need("tokenizer.ggml.model", str)
    defaults: dict[str, int] = {}
    if model == "gpt2":
        backend, add_bos = _byte_level(metadata, tokens)
    elif model == "llama":
        backend, add_bos, defaults = _sentencepiece(metadata, tokens), True, SENTENCEPIECE_IDS
    else:
        raise metadata.error("tokenizer.ggml.model", f"{model!r} is not supported: rayllm reads 'gpt2' and 'llama'")

    ends = {name: _token_id(metadata, name, num_tokens, defaults.get(name)) for name in ("bos", "eos")}
    is_phi3 = re.search("phi-?3", metadata.get("general.name", str, ""), re.IGNORECASE)
    backend.add_tokens(
        [
            AddedToken(
                token,
                normalized=False,
                special=kind != USER_DEFINED or token_id in ends.values(),
                rstrip=bool(is_phi3) and token not in PHI3_KEEP_BLANKS,
            )
            for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) or token_id in ends.values()
        ]
    )
    added = {name: metadata.get(f"tokenizer.ggml.add_{name}_token", bool, name == "bos" and add_bos) for name in ends}
    if lacking := [name for name in ends if added[name] and ends[name] is None]:
        raise metadata.error(f"tokenizer.ggml.{lacking[0]}_token_id", "must be a token, which is added to every text")
    backend.post_processor = processors.TemplateProcessing(
        single=["bos"] * added["bos"] + ["$A"] + ["eos"] * added["eos"],
        special_tokens=[
            {"id": name, "ids": [token_id], "tokens": [tokens[token_id]]}
            for name, token_id in ends.items()
            if token_id is not None
        ],
    )
    backend.save(str(folder / "tokenizer.json"))
    named = ends | {
        "unk": _token_id(metadata, "unknown", num_tokens, defaults.get("unknown")),
        "pad": _token_id(metadata, "padding", num_tokens, None),
    }
    config = {f"{name}_token": tokens[token_id] for name, token_id in named.items() if token_id is not None}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if (template := metadata.get("tokenizer.chat_template", str)) is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    eos = [] if ends["eos"] is None else [ends["eos"]]
    kinds_of = enumerate(zip(tokens, kinds, strict=True))
    return eos + [token_id for token_id, (token, kind) in kinds_of if kind == CONTROL and token in ENDS]


def _tokens(metadata: Metadata, num_embeddings: int | None) -> list[str]:
    """The tokens in the order of their ids, each another."""
    key = "tokenizer.ggml.tokens"
    if (tokens := metadata.array(key, str)) is None:
        raise metadata.lacks(key)
    if num_embeddings is not None and len(tokens) != num_embeddings:
        raise metadata.error(key, f"has {len(tokens)} tokens, but token_embd.weight {num_embeddings} rows")
    tokens = [token or f"[EMPTY_{token_id}]" for token_id, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        raise metadata.error(key, f"has {Counter(tokens).most_common(1)[0][0]!r} twice")
    return tokens


def _token_id(metadata: Metadata, name: str, num_tokens: int, default: int | None) -> int | None:
    """The id that the file gives for a special token; None for an id that is no token."""
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = metadata.get(key, int) if key in metadata else default
    if token_id is None or 0 <= token_id < num_tokens:
        return token_id
    logger.warning("%s: %s %d is no token and left out", metadata.file, key, token_id)
    return None


def _byte_level(metadata: Metadata, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """Byte-pair encoding of words of bytes, as of GPT-2, and whether texts begin with the BOS token by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if (name := metadata.get("tokenizer.ggml.pre", str)) is None:
        logger.warning("%s lacks tokenizer.ggml.pre: its tokens may not be those that the model knows", metadata.file)
        name = "default"
    if (split := SPLITS.get(name)) is None:
        raise metadata.error(
            "tokenizer.ggml.pre", f"{name!r} is not supported: use the model's Hugging Face folder, or convert it anew"
        )
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = _merges(metadata, vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.ignore_merges))
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_only])
    backend.decoder = decoders.ByteLevel()
    return backend, split.add_bos


def _merges(metadata: Metadata, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    key = "tokenizer.ggml.merges"
    if (lines := metadata.array(key, str)) is None:
        raise metadata.lacks(key)
    merges = []
    for line in lines:
        space = line.find(" ", 1)
        first, second = line[:space], line[space + 1 :]
        if space < 0 or not {first, second, first + second} <= vocabulary.keys():
            raise metadata.error(key, f"has {line!r}, which is not two tokens that make one")
        merges.append((first, second))
    return merges


def _sentencepiece(metadata: Metadata, tokens: Sequence[str]) -> Tokenizer:
    """SentencePiece's byte-pair encoding of a text as a whole, in which spaces are characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    key = "tokenizer.ggml.scores"
    if (scores := metadata.array(key, float, len(tokens))) is None:
        raise metadata.lacks(key)
    unknown = _token_id(metadata, "unknown", len(tokens), SENTENCEPIECE_IDS["unknown"])
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    # The best token is merged first, whatever it is merged from.
    merges = [
        (token[:cut], token[cut:])
        for token_id, token in sorted(enumerate(tokens), key=lambda entry: -scores[entry[0]])
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merged = {vocabulary[first + second] for first, second in merges}
    if len(merged) > 1 and len({scores[token_id] for token_id in merged}) == 1:
        raise metadata.error(key, "are all alike: they do not say which tokens are merged first")
    unk_token = None if unknown is None else tokens[unknown]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", bool, True)
    spelling = normalizers.Replace(" ", BLANK)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), spelling]) if has_prefix else spelling
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return backend
