"""A .gguf file as a Hugging Face folder plus a table of its tensors, converted once and cached.

Reading the metadata takes many seconds, mostly for the vocabulary; from the cache every later load, and that
of every other shard of the node, takes milliseconds. A model that was split into several files goes by the first.
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
from rayllm.checkpoint.gguf_metadata import Metadata, part_names, read_parts
from rayllm.checkpoint.gguf_tokenizer import write_tokenizer
from rayllm.errors import UsageError
from rayllm.models.architectures import GGUF_ARCHITECTURES

CACHE_VERSION = 2
INDEX_FILE = "tensors.json"


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: `ggml_type` a value of gguf.GGMLQuantizationType, `shape` in torch's order
    (outputs first), `part` the file's name, `offset` in bytes from its start, `nbytes` of quantised data."""

    ggml_type: int
    shape: tuple[int, ...]
    part: str
    offset: int
    nbytes: int


def read_index(path: str | Path) -> dict[str, GGUFTensor]:
    """The tensors of a .gguf file by GGUF name."""
    entries = json.loads((converted(path) / INDEX_FILE).read_text())
    return {name: GGUFTensor(kind, tuple(shape), *place) for name, (kind, shape, *place) in entries.items()}


def converted(path: str | Path, progress: bool = False) -> Path:
    """The cache folder of a .gguf file, made if need be: config.json, tokenizer files, the table of tensors. A file of
    a vocabulary, without tensors, has no config.json.

    Raises UsageError for a damaged file, metadata that are wrong, or an architecture that rayllm does not run.
    """
    file = located(path)
    parts = [file.with_name(name) for name in part_names(file.name)]
    stats = [(part.name, stat.st_size, stat.st_mtime_ns) for part in parts if part.exists() and (stat := part.stat())]
    key = f"{CACHE_VERSION} {file} {stats}"
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


def located(path: str | Path) -> Path:
    """The absolute path of a .gguf file. It keeps its name where it is a link, since that says what the parts are."""
    return Path(path).parent.resolve() / Path(path).name


def _convert(file: Path, folder: Path, progress: bool) -> None:
    from tqdm import tqdm

    with tqdm(total=3, desc=f"converting {file.name} (once)", leave=False, disable=not progress or None) as steps:
        metadata, parts = read_parts(file)
        tensors = {
            tensor.name: GGUFTensor(
                int(tensor.tensor_type),
                tuple(int(n) for n in reversed(tensor.shape)),
                part,
                int(tensor.data_offset),
                int(tensor.n_bytes),
            )
            for part, reader in parts.items()
            for tensor in reader.tensors
        }
        all_tensors = (tensor for reader in parts.values() for tensor in reader.tensors)
        rope_freqs = next((t.data.tolist() for t in all_tensors if t.name == "rope_freqs.weight"), None)
        config = _config(metadata, tensors, rope_freqs) if tensors else {}
        steps.update()
        ends = write_tokenizer(metadata, folder, config.get("vocab_size"))
        steps.update()
        if config:
            config["eos_token_id"] = ends + config["eos_token_id"]
            (folder / "config.json").write_text(json.dumps(config, indent=1))
        entries = {name: tuple(asdict(tensor).values()) for name, tensor in tensors.items()}
        (folder / INDEX_FILE).write_text(json.dumps(entries))
        steps.update()


def _config(metadata: Metadata, tensors: Mapping[str, GGUFTensor], rope_freqs: list[float] | None) -> dict[str, Any]:
    """A config.json from GGUF metadata (keys: ggml's docs/gguf.md)."""
    name = metadata.need("general.architecture", str)
    if (record := GGUF_ARCHITECTURES.get(name)) is None:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise metadata.error("general.architecture", f"{name!r} is not supported: rayllm runs {known}")
    if metadata.get(f"{name}.expert_count", int):
        raise metadata.error(f"{name}.expert_count", "is not 0: rayllm runs dense models")
    num_layers = metadata.positive(f"{name}.block_count", int)
    hidden_size = metadata.positive(f"{name}.embedding_length", int)
    intermediate_size = metadata.of_all_layers(f"{name}.feed_forward_length", num_layers)
    heads = metadata.of_all_layers(f"{name}.attention.head_count", num_layers)
    kv_heads = metadata.of_all_layers(f"{name}.attention.head_count_kv", num_layers, heads)
    head_dim = metadata.positive(f"{name}.attention.key_length", int, max(1, hidden_size // heads))
    context_length = metadata.positive(f"{name}.context_length", int)
    if num_layers > len(tensors):
        raise metadata.error(f"{name}.block_count", f"is {num_layers}, but there are only {len(tensors)} tensors")
    if lacking := [tensor for tensor in ("token_embd.weight", "blk.0.attn_q.weight") if tensor not in tensors]:
        raise UsageError(f"{metadata.file} lacks the tensor {lacking[0]}")
    for tensor, dim, size, *keys in (
        ("token_embd.weight", 1, hidden_size, "embedding_length"),
        ("blk.0.attn_q.weight", 0, heads * head_dim, "attention.head_count", "attention.key_length"),
        ("blk.0.attn_k.weight", 0, kv_heads * head_dim, "attention.head_count_kv", "attention.key_length"),
        ("blk.0.ffn_gate.weight", 0, intermediate_size, "feed_forward_length"),
    ):
        if tensor in tensors and (shape := tensors[tensor].shape)[dim:][:1] != (size,):
            wrong = " or ".join(f"{name}.{key}" for key in keys)
            raise metadata.error(wrong, f"does not fit the tensor {tensor} of shape {list(shape)}")
    if metadata.get(f"{name}.rope.dimension_count", int, head_dim) != head_dim:
        raise metadata.error(f"{name}.rope.dimension_count", f"must be {head_dim}: rayllm rotates whole heads")
    more_ends = [metadata.get(f"tokenizer.ggml.{kind}_token_id", int) for kind in ("eot", "eom")]
    return {
        "architectures": [record.class_name],
        "model_type": record.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": metadata.positive(f"{name}.attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": context_length,
        "rope_parameters": _rope(metadata, f"{name}.rope", context_length, rope_freqs),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "dtype": _dtype(tensors["blk.0.attn_q.weight"].ggml_type),
        "eos_token_id": [token_id for token_id in more_ends if token_id is not None],
    }


def _rope(metadata: Metadata, prefix: str, context_length: int, freqs: list[float] | None) -> dict[str, Any]:
    """`rope_parameters` from the keys that begin with `prefix`."""
    rope = {"rope_type": "default", "rope_theta": metadata.positive(f"{prefix}.freq_base", float, 10000.0)}
    if freqs is not None:
        return rope | {"rope_type": "factors", "factors": freqs}
    former = metadata.positive(f"{prefix}.scale_linear", float, 1.0)  # the factor's key in files of 2023
    factor = metadata.positive(f"{prefix}.scaling.factor", float, former)
    if factor < 1:
        raise metadata.error(f"{prefix}.scaling.factor", f"must be at least 1, not {factor}")
    if (kind := metadata.get(f"{prefix}.scaling.type", str, "none" if factor == 1.0 else "linear")) == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise metadata.error(f"{prefix}.scaling.type", f"{kind!r} is not supported: rayllm runs none, linear and yarn")
    original = metadata.positive(f"{prefix}.scaling.original_context_length", int, context_length)
    return rope | {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}


def _dtype(ggml_type: int) -> str:
    """The files' own type; 'bfloat16' for quantised ones, in whose range any model fits."""
    return {0: "float32", 1: "float16"}.get(ggml_type, "bfloat16")
