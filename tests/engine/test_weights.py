"""What each rank reads of a checkpoint, and what is refused."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from engine_testing import WHOLE, greedy
from safetensors.torch import save_file
from tiny_configs import SIX_HEADS

from rayllm import LLM
from rayllm.checkpoint import bucket
from rayllm.checkpoint.gguf import converted
from rayllm.checkpoint.sources import resolve_model
from rayllm.checkpoint.weights import load_weights
from rayllm.errors import UsageError
from rayllm.models.decoder import build_model
from rayllm.models.parallel import TensorParallel

VARIANTS = {
    "llama": {"model_type": "llama", "vocab_size": 260},
    "llama-bias": {"model_type": "llama", "vocab_size": 262, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "vocab_size": 261},
    "qwen3": {"model_type": "qwen3", "vocab_size": 260, "tie_word_embeddings": True},
    "smollm3": {"model_type": "smollm3", "vocab_size": 261},
}


def random_checkpoint(config):
    """Every tensor of the model, by its Hugging Face name."""
    model = build_model(config, TensorParallel(), "cpu", torch.float32, 16)
    return {part.name: torch.randn(part.shape) for part in model.weight_slices()}


def write_folder(folder, config, tensors, files=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIX_HEADS | config))
    names = sorted(tensors)
    weight_map = {name: f"part-{i % files}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: tensors[name].clone() for name in names if weight_map[name] == file}
        save_file(part, folder / file)
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_gguf(file, config, tensors, quantization, tensors_per_part=0):
    """As llama.cpp's converter does: rows of q and k of a Llama or SmolLM3 reordered, vectors in float32."""
    architecture = config.model_type
    writer = gguf.GGUFWriter(file, architecture, split_max_tensors=tensors_per_part)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    letters = [chr(256 + i) for i in range(config.vocab_size - 3)]
    writer.add_token_list(["<|end|>", "<|turn|>", *letters, letters[0] + letters[1]])
    writer.add_token_types([3, 3] + [1] * (len(letters) + 1))
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if architecture in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
            pairs = values.reshape(-1, 2, config.head_dim // 2, *values.shape[1:])
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        kind = quantization if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target, gguf.quantize(values, kind), raw_dtype=kind)
    if architecture == "llama":
        factors = np.linspace(1, 8, config.head_dim // 2, dtype=np.float32)
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def load(source, rank=0, size=1):
    """(name → its part on this rank, what it must hold of the checkpoint's tensor, bytes read)."""
    tp = TensorParallel(rank, size)
    model = build_model(source.config, tp, "cpu", torch.float32, 16)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    num_bytes = load_weights(model, source, tp)
    assert not any(parameter[: model.embed_tokens.tokens.size].isnan().any() for parameter in model.parameters())
    return {part.name: part for part in model.weight_slices()}, num_bytes


def expect_slices(source, size, tensors):
    """Each of `size` ranks holds its slices of `tensors`, together every value; returns the bytes of each rank."""
    seen = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    read = []
    for rank in range(size):
        parts, num_bytes = load(source, rank, size)
        read.append(num_bytes)
        for name, part in parts.items():
            span = part.start, part.target.shape[part.dim]
            torch.testing.assert_close(part.target.data, tensors[name].narrow(part.dim, *span), rtol=0, atol=0)
            seen[name].narrow(part.dim, *span).fill_(1)
    assert all(count.all() for count in seen.values())
    return read


@pytest.fixture(params=VARIANTS)
def variant(request, tmp_path):
    folder = write_folder(tmp_path / "shape", VARIANTS[request.param], {})
    config = resolve_model(str(folder), load_format="dummy").config
    return VARIANTS[request.param], config, random_checkpoint(config)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_safetensors_slices(variant, size, files, tmp_path):
    fields, config, tensors = variant
    if 6 % size or (3 % size and size % 3):
        return
    source = resolve_model(str(write_folder(tmp_path / "model", fields, tensors, files)))
    read = expect_slices(source, size, tensors)
    whole = 4 * sum(tensor.numel() for tensor in tensors.values())
    if size == 1:
        assert read == [whole]
    replicated = 4 * sum(t.numel() for name, t in tensors.items() if "norm" in name or "bias" in name)
    kv = 4 * sum(t.numel() for name, t in tensors.items() if ".k_proj" in name or ".v_proj" in name)
    assert max(read) <= whole / size + replicated + kv + 4 * config.hidden_size


def test_smaller_dtype_is_widened(tmp_path):
    folder = write_folder(tmp_path / "model", VARIANTS["llama"], {})
    config = resolve_model(str(folder), load_format="dummy").config
    tensors = {name: tensor.bfloat16() for name, tensor in random_checkpoint(config).items()}
    write_folder(folder, VARIANTS["llama"], tensors)
    read = expect_slices(resolve_model(str(folder)), 3, {n: t.float() for n, t in tensors.items()})
    assert sum(read) == pytest.approx(2 * sum(tensor.numel() for tensor in tensors.values()), rel=0.02)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_gguf_slices(variant, kind, tmp_path, monkeypatch):
    """With 3 ranks every border falls on a block of 32 values; with 6 some blocks are read by two ranks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, config, tensors = variant
    quantization = gguf.GGMLQuantizationType[kind]
    source = resolve_model(str(write_gguf(tmp_path / "model.gguf", config, tensors, quantization)))
    assert source.config.eos_token_ids == (1, 0), "what it names, then what is spelled like an end"
    for name in ("layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"):
        assert getattr(source.config, name) == getattr(config, name), name
    for name in ("num_key_value_heads", "rope_theta", "rms_norm_eps", "qkv_bias", "qk_norm", "tie_word_embeddings"):
        assert getattr(source.config, name) == pytest.approx(getattr(config, name)), name  # of float32
    if config.model_type == "llama":
        assert source.config.rope_scaling.factors[-1] == 8

    def stored(tensor):
        if tensor.dim() == 1:
            return tensor
        return torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), quantization), quantization))

    expected = {name: stored(tensor) for name, tensor in tensors.items()}
    (whole,) = expect_slices(source, 1, expected)
    assert max(expect_slices(source, 3, expected)) < 0.36 * whole
    expect_slices(source, 6, expected)


def test_gguf_in_parts(variant, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, config, tensors = variant
    write_gguf(tmp_path / "model.gguf", config, tensors, gguf.GGMLQuantizationType.F32, tensors_per_part=5)
    first, *others = sorted(tmp_path.glob("model-*.gguf"))
    assert len(others) > 2
    expect_slices(resolve_model(str(first)), 3, tensors)


def test_gguf_of_a_real_model_is_split(smollm2):
    source = resolve_model(str(smollm2))
    tensors = {name: part.target.clone() for name, part in load(source)[0].items()}
    sizes = expect_slices(source, 3, tensors)
    assert max(sizes) < 0.34 * smollm2.stat().st_size


def test_gguf_is_converted_once(variant, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, config, tensors = variant
    file = write_gguf(tmp_path / "model.gguf", config, tensors, gguf.GGMLQuantizationType.F16)
    folder = converted(file)
    assert folder.is_relative_to(tmp_path / "cache" / "rayllm" / "gguf")
    monkeypatch.setattr(gguf, "GGUFReader", None)
    assert converted(file) == folder
    assert list(folder.parent.iterdir()) == [folder]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file.write_bytes(file.read_bytes() + b"\0" * 32)
    assert converted(file) != folder


def test_damaged_gguf_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(random.choice([b"GGUF", b""]) + random.randbytes(random.randint(0, 100)))
    with pytest.raises(UsageError, match=r"model\.gguf"):
        resolve_model(str(file))
    assert list((tmp_path / "cache" / "rayllm" / "gguf").iterdir()) == []


def test_wrong_tensors_are_named(tmp_path):
    folder = write_folder(tmp_path / "model", VARIANTS["qwen3"], {})
    tensors = random_checkpoint(resolve_model(str(folder), load_format="dummy").config)
    name = random.choice(list(tensors))

    write_folder(folder, VARIANTS["qwen3"], {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(UsageError, match=name):
        load(resolve_model(str(folder)))
    write_folder(folder, VARIANTS["qwen3"], tensors | {name: torch.cat((tensors[name], tensors[name]))})
    with pytest.raises(UsageError, match=rf"{name} has shape \[{2 * len(tensors[name])}"):
        load(resolve_model(str(folder)))
    write_folder(folder, VARIANTS["qwen3"], tensors | {"lm_head.weight": torch.zeros(1)})  # tied: not looked at
    load(resolve_model(str(folder)))
    file = folder / "part-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"part-0\.safetensors is damaged"):
        load(resolve_model(str(folder)))


def test_missing_file_of_an_index(tmp_path):
    folder = write_folder(tmp_path / "model", VARIANTS["llama"], {})
    tensors = random_checkpoint(resolve_model(str(folder), load_format="dummy").config)
    write_folder(folder, VARIANTS["llama"], tensors, files=3)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(UsageError, match=r"part-1\.safetensors is missing"):
        load(resolve_model(str(folder)))


def test_models_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pickled = write_folder(tmp_path / "pickled", VARIANTS["llama"], {})
    (pickled / "part-0.safetensors").unlink(missing_ok=True)
    (pickled / "pytest_model.bin").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("not JSON")
    for model, load_format, message in [
        (pickled, "auto", "pickled"),
        (tmp_path / "empty", "auto", "no config.json"),
        (tmp_path / "nowhere", "auto", "no model at"),
        (tmp_path / "nowhere.gguf", "auto", "no file"),
        (tmp_path / "text.json", "dummy", "not readable JSON"),
        (tmp_path / "text.json", "auto", "no model at"),
        ("somebody/some-model", "auto", "could not be downloaded"),
    ]:
        with pytest.raises(UsageError, match=message) as refused:
            resolve_model(str(model), load_format)
        assert "\n" not in str(refused.value)
    assert resolve_model(str(pickled), "dummy").format == "dummy"


def test_a_model_behind_a_url(engine_pool, tiny_models: dict[str, Path], reference):
    """Whoever starts the engine fetches what is small, the shards the weights, to where their node keeps them."""
    url = tiny_models["llama"].as_uri()
    engine_pool.make_room(2)
    copy = bucket.folder_of(url)
    try:
        source = resolve_model(url, progress=False)
        assert not list(copy.glob("*.safetensors"))
        assert source.config == resolve_model(str(tiny_models["llama"])).config
        arguments = {"device": "cpu", "skip_tokenizer_init": True, "tensor_parallel_size": 2, "progress": False}
        with LLM(url, **arguments, **WHOLE) as llm:
            [result] = llm.generate([[1, 2, 3]], greedy(16), use_tqdm=False)
        assert list(copy.glob("*.safetensors"))
        reference("llama").check_greedy([[1, 2, 3]], [result["token_ids"]], 16)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def test_a_path_that_a_node_lacks(tmp_path: Path, tiny_models: dict[str, Path]):
    source = resolve_model(str(tiny_models["llama"]))
    assert source.on_this_node(weights=True) == source
    with pytest.raises(UsageError, match=r"is not on this node: give a path that all nodes share, a Hub id or a URL"):
        dataclasses.replace(source, path=str(tmp_path / "elsewhere")).on_this_node(weights=True)
