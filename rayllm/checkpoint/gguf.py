"""A .gguf file as a Hugging Face folder plus a table of its tensors, converted once and cached.

Reading the metadata takes many seconds, mostly for the vocabulary; from the cache every later load, and that
of every other shard of the node, takes milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayllm.caches import cache_roots, writable_cache
from rayllm.errors import UsageError
from rayllm.models.architectures import gguf_architecture

CACHE_VERSION = 2
INDEX_FILE = "tensors.json"
CONTROL = 3
"""The type of tokens that stand for no text, in `tokenizer.ggml.token_type`."""
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>"),
    *("[EOT]", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>"),
)
"""How control tokens that end a turn or a text are spelled: files often name but one of them, as llama.cpp knows."""


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: `ggml_type` a value of gguf.GGMLQuantizationType, `shape` in torch's order
    (outputs first), `offset` in bytes from the start of the file, `nbytes` of quantised data."""

    ggml_type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_index(path: str | Path) -> dict[str, GGUFTensor]:
    """The tensors of a .gguf file by GGUF name."""
    entries = json.loads((converted(path) / INDEX_FILE).read_text())
    return {name: GGUFTensor(kind, tuple(shape), *place) for name, (kind, shape, *place) in entries.items()}


def converted(path: str | Path, progress: bool = False) -> Path:
    """The cache folder of a .gguf file, made if need be: config.json, tokenizer files, the table of tensors.

    Raises UsageError for a damaged file or an architecture that rayllm does not run.
    """
    file = Path(path).resolve()
    stat = file.stat()
    key = f"{CACHE_VERSION} {file} {stat.st_size} {stat.st_mtime_ns}"
    name = f"gguf/{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    found = (root / name for root in cache_roots() if os.path.isdir(root / name))  # unlike Path's, it never raises
    if known := next(found, None):
        return known
    folder = writable_cache("gguf").parent / name
    unfinished = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        _convert(file, unfinished, progress)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    except OSError as error:
        raise UsageError(f"{file} cannot be converted in {folder.parent}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path, progress: bool) -> None:
    import gguf
    from tqdm import tqdm

    with tqdm(total=3, desc=f"converting {file.name} (once)", leave=False, disable=not progress) as steps:
        try:
            reader = gguf.GGUFReader(file)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise UsageError(f"{file} is not a readable GGUF file: {error}") from error
        tensors = {
            tensor.name: GGUFTensor(
                int(tensor.tensor_type),
                tuple(int(n) for n in reversed(tensor.shape)),
                int(tensor.data_offset),
                int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        }
        rope_freqs = next((t.data.tolist() for t in reader.tensors if t.name == "rope_freqs.weight"), None)
        metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if len(field.types) == 1 and not name.startswith("GGUF.")
        }
        try:
            config = _config(metadata, tensors, rope_freqs)
        except KeyError as error:
            raise UsageError(f"{file} lacks {error}") from error
        steps.update()
        tokenizer = _tokenizer(file)
        steps.update()
        for kind in ("bos", "eos"):  # some versions of transformers take the wrong ones
            if (token_id := metadata.get(f"tokenizer.ggml.{kind}_token_id")) is not None:
                setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token_id))
        config["eos_token_id"] += _ends(reader.fields)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = metadata.get("tokenizer.chat_template")
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        entries = {name: tuple(asdict(tensor).values()) for name, tensor in tensors.items()}
        (folder / INDEX_FILE).write_text(json.dumps(entries))
        steps.update()


def _tokenizer(file: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:  # AutoTokenizer would do the same after reading the whole metadata once more
        return PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError) as error:
        raise UsageError(f"the tokenizer in {file} cannot be read by transformers: {error}") from error


def _ends(fields: Mapping[str, Any]) -> list[int]:
    """The ids of control tokens that are spelled as one of `ENDS`."""
    tokens, types = (fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if tokens is None or types is None:
        return []
    spelled = {spelling.encode() for spelling in ENDS}
    return [
        token_id
        for token_id, (part, kind) in enumerate(zip(tokens.data, types.data, strict=False))
        if types.parts[kind][0] == CONTROL and bytes(tokens.parts[part]) in spelled
    ]


def _config(
    metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor], rope_freqs: list[float] | None
) -> dict[str, Any]:
    """A config.json from GGUF metadata (keys: ggml's docs/gguf.md)."""
    record = gguf_architecture(metadata.get("general.architecture", ""))

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{record.gguf_name}.{key}", default)

    if get("expert_count"):
        raise UsageError("mixture-of-experts GGUF files are not supported: rayllm runs dense models")
    heads = get("attention.head_count")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": get("rope.freq_base", 10000.0)}
    if rope_freqs is not None:
        rope |= {"rope_type": "factors", "factors": rope_freqs}
    elif (scaling := get("rope.scaling.type", "none")) != "none":
        rope |= {"rope_type": scaling, "factor": get("rope.scaling.factor", 1.0)}
        rope |= {"original_max_position_embeddings": get("rope.scaling.original_context_length")}
    head_dim = get("attention.key_length") or get("embedding_length") // heads
    rope["partial_rotary_factor"] = get("rope.dimension_count", head_dim) / head_dim
    eos_ids = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return {
        "architectures": [record.class_name],
        "model_type": record.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": get("context_length"),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "dtype": _dtype(tensors["blk.0.attn_q.weight"].ggml_type),
        "eos_token_id": [token_id for token_id in eos_ids if token_id is not None],
    }


def _dtype(ggml_type: int) -> str:
    """The files' own type; 'bfloat16' for quantised ones, in whose range any model fits."""
    return {0: "float32", 1: "float16"}.get(ggml_type, "bfloat16")
