"""Small .gguf files, for tests of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from rayllm.frontend.tokenizer import BYTE_LEVEL_ALPHABET

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
FIRST_LETTER = 3
LETTERS = list(BYTE_LEVEL_ALPHABET)
WORDS = ["Ġt", "he", "Ġthe", "00", "000", "ĊĊ", "ĠĠ"]
BPE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<|bos|>", "<|eos|>", "[think]", *LETTERS, *WORDS],
    "tokenizer.ggml.token_type": [CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * (len(LETTERS) + len(WORDS)),
    "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he", "0 0", "00 0", "Ċ Ċ", "Ġ Ġ"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
}
PIECES = ["▁", "l", "e", "a", "d", "le", "ad", "lead", "▁lead", "▁▁", "▁▁▁▁", "\n", "!"]
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *PIECES, "[tool]"],
    "tokenizer.ggml.scores": [0.0] * 259 + [-float(len(PIECES) - n) for n in range(len(PIECES))] + [0.0],
    "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(PIECES) + [USER_DEFINED],
}
MODEL = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5e5,
    "llama.rope.dimension_count": 4,
}
ROWS = {
    f"blk.{layer}.{name}.weight": rows
    for layer in range(2)
    for name, rows in [("attn_q", 16), ("attn_k", 8), ("ffn_gate", 32)]
}
"""Those of a model's matrices that are looked at before the others."""


def write(file: Path, metadata: dict[str, Any], num_tokens: int | None = None, parts: int = 1) -> Path:
    """A model of these metadata, of which None stands for a key that is not there, with as many embeddings as tokens;
    with 0 embeddings there are no tensors."""
    writer = gguf.GGUFWriter(file, "", split_max_tensors=3 if parts == 3 else 0)
    for key, value in metadata.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    if num_tokens is None:
        tokens = metadata.get("tokenizer.ggml.tokens")
        num_tokens = len(tokens) if isinstance(tokens, list) else 8
    if num_tokens:
        writer.add_tensor("token_embd.weight", np.zeros((num_tokens, 16), np.float32))
        for number, (name, rows) in enumerate(ROWS.items()):
            writer.add_tensor(name, np.full((rows, 16), number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file if parts == 1 else file.with_name(f"{file.stem}-00001-of-{parts:05d}.gguf")
