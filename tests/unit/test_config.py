"""The configuration: what it refuses, what it decides, and its flags on the command line."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from deployments.config import KEY_VARIABLE, ApiConfig, ServedModel, read_arguments
from rayllm.config import EngineArgs, EngineConfig
from rayllm.errors import UsageError
from rayllm.models.config_json import read_config
from rayllm.options import add_arguments, from_arguments

CONFIG = {"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64}
CONFIG |= {"num_attention_heads": 2, "num_hidden_layers": 1}
FIELDS = [option.name for option in dataclasses.fields(EngineArgs)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": ""}, "model must be a model folder"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1, not 0"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"block_size": -1}, "block_size must be at least 1"),
        ({"max_model_len": 1}, "max_model_len must be at least 2"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be at least"),
        ({"max_num_batched_tokens": 7, "max_num_seqs": 8}, r"at least max_num_seqs \(8\).*not 7"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes must be at least 1"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override must be at least 1"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization must be over 0 and at most 1, not 1.1"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"),
        ({"placement_timeout_s": -1}, "placement_timeout_s"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, not 'int8'"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, not 'tpu'"),
        ({"step_timeout_s": 0}, "step_timeout_s must be over 0"),
        ({"snapkv_limit": 35}, "snapkv_limit must be at least 36, the tokens that are always kept, not 35"),
        ({"snapkv_attn_sample_queries": 1}, "snapkv_attn_sample_queries must be at least 2"),
        ({"snapkv_policy": "h2o"}, "snapkv_policy must be one of snapkv, streaming"),
        ({"load_format": "pt"}, "load_format must be one of auto, dummy"),
        ({"tokenizer": "a", "skip_tokenizer_init": True}, "skip_tokenizer_init must be off"),
        ({"max_num_seqs": "8"}, "max_num_seqs must be int, not '8'"),
        ({"max_model_len": 100.0}, "max_model_len must be int or None, not 100.0"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size must be int, not True"),
        ({"enforce_eager": "yes"}, "enforce_eager must be bool, not 'yes'"),
        ({"model": None}, "model must be str, not None"),
        ({"max_modellen": 5}, "unknown engine argument max_modellen: did you mean max_model_len?"),
        ({"tensor_parallel": 2}, "did you mean tensor_parallel_size?"),
        ({"zzz": 2}, "unknown engine argument zzz: known are .*block_size.*"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message) as refused:
        EngineArgs.of(**{"model": "m"} | arguments)
    assert "\n" not in str(refused.value)
    assert refused.value.param in arguments


def test_numbers_of_any_kind():
    assert EngineArgs(model="m", gpu_memory_utilization=1, placement_timeout_s=5).gpu_memory_utilization == 1


def resolve(device: Any, model_dtype: str = "bfloat16", kv_heads: int = 4, **arguments: Any) -> EngineConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": kv_heads}
    length = {"vocab_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 4096}
    model = read_config({"model_type": "llama", "dtype": model_dtype, **sizes, **length})
    return EngineArgs(model="m", **arguments).resolve(model, device)


def test_what_device_and_model_decide():
    cpu, gpu = resolve("cpu"), resolve("cuda")
    assert (cpu.device, cpu.dtype, cpu.max_model_len, cpu.max_num_batched_tokens) == ("cpu", "float32", 4096, 1024)
    assert (gpu.device, gpu.dtype, gpu.max_model_len, gpu.max_num_batched_tokens) == ("cuda", "bfloat16", 4096, 8192)
    assert (cpu.step_timeout_s, gpu.step_timeout_s) == (300, 10)
    assert resolve("cuda", "float16").dtype == "float16"
    assert resolve("cuda", "float32").dtype == "bfloat16"
    assert resolve("cuda", dtype="float32").dtype == "float32"
    assert resolve("cpu", max_num_seqs=2000).max_num_batched_tokens == 2000
    assert resolve("cpu", max_num_seqs=2000, enable_snapkv=True).max_num_batched_tokens == 2032


def test_what_is_given_stays():
    given = {
        "dtype": "float16",
        "tensor_parallel_size": 2,
        "max_model_len": 100,
        "max_num_seqs": 200,
        "max_num_batched_tokens": 300,
        "block_size": 7,
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory_bytes": 10**6,
        "num_gpu_blocks_override": 30,
        "enable_prefix_caching": False,
        "enable_snapkv": True,
        "snapkv_limit": 77,
        "snapkv_attn_sample_queries": 16,
        "snapkv_policy": "streaming",
        "enforce_eager": True,
        "seed": 5,
        "step_timeout_s": 3.0,
        "placement_timeout_s": 4.0,
    }
    config = resolve("cpu", **given)
    assert dataclasses.asdict(config) == given | {
        "device": "cpu",
        "tokenizer": None,
        "skip_tokenizer_init": False,
        "min_snapkv_limit": 20,
        "sampling_defaults": (),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_model_len": 4097}, "max_model_len must be at most 4096 for this model, not 4097"),
        ({"device": "cuda", "block_size": 24}, "block_size must be a multiple of 16 on a GPU, not 24"),
        (
            {"enable_snapkv": True, "max_num_batched_tokens": 280},
            r"max_num_batched_tokens must be at least .* \(288\), not 280",
        ),
        (
            {"enable_snapkv": True, "tensor_parallel_size": 4, "kv_heads": 2},
            "tensor_parallel_size must be at most 2 with enable_snapkv",
        ),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size 3 cannot split 4 query heads"),
    ],
)
def test_what_device_and_model_refuse(arguments: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        resolve(**{"device": "cpu"} | arguments)


def test_texts_become_what_fields_hold():
    """As `serve run` hands them over."""
    texts = {"model": "8", "max_num_seqs": "8", "max_model_len": "null", "seed": "x", "enforce_eager": "True"}
    parsed = EngineArgs.parse(texts | {"gpu_memory_utilization": "0.5", "dtype": "float32", "other": "1"})
    expected = {"model": "8", "max_num_seqs": 8, "max_model_len": None, "seed": "x", "enforce_eager": True}
    assert parsed == expected | {"gpu_memory_utilization": 0.5, "dtype": "float32", "other": "1"}


def test_arguments_of_the_service():
    api, [model] = read_arguments({"model": "a/b.gguf", "num_replicas": "2", "api_keys": '["k"]', "max_body_bytes": 5})
    assert (model.name, model.num_replicas, api.api_keys, api.max_body_bytes) == ("b", 2, ("k",), 5)
    api, models = read_arguments({"models": [{"model": "x/"}, {"model": "y", "served_model_name": "z"}]})
    assert [model.name for model in models] == ["x", "z"]
    for arguments, message in (
        ({"models": [], "api_keys": ["k"]}, "models must be a list with the arguments of each model"),
        ({"models": [{"model": "x"}], "max_num_seqs": 4}, "unknown engine argument max_num_seqs"),
        ({"models": [{"model": "x"}, {"model": "y/x"}]}, "served_model_name must differ .* two are called x"),
        ({"model": "x", "api_key": "k"}, "did you mean api_keys"),
        ({"model": "x", "api_replicas": 0}, "api_replicas must be at least 1"),
    ):
        with pytest.raises(UsageError, match=message):
            read_arguments(arguments)


@pytest.mark.parametrize("given", ["a", ["a"], ("a",), '["a"]'])
def test_one_name(given: Any):
    _, [model] = read_arguments({"model": "m", "served_model_name": given})
    assert (model.name, model.served_names) == ("a", ("a",))


def test_several_names():
    _, [model] = read_arguments({"model": "m", "served_model_name": ["a", "b"]})
    assert (model.name, model.served_names) == ("a", ("a", "b"))
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    add_arguments(parser.add_argument_group("model"), ServedModel)
    shown = from_arguments(parser.parse_args(["m", "--served-model-name", "a", "b"]), ServedModel)
    assert shown.served_names == ("a", "b")
    assert ServedModel(model="folder/m.gguf").served_names == ("m",)
    for names, message in (
        (["a", ""], "served_model_name must be non-empty texts"),
        (["a", 5], "served_model_name must be non-empty texts"),
        (5, "served_model_name must be str or list or None, not 5"),
        (["a", "a"], "two are called a"),
    ):
        with pytest.raises(UsageError, match=message):
            read_arguments({"model": "m", "served_model_name": names})
    models = [{"model": "x", "served_model_name": ["a", "b"]}, {"model": "y", "served_model_name": "b"}]
    with pytest.raises(UsageError, match="two are called b"):
        read_arguments({"models": models})


def test_keys_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Arguments, a file with a byte order mark, blank lines and blanks, and the environment."""
    file = tmp_path / "keys"
    file.write_bytes("\ufeffone\r\n\n  two \ngiven".encode())
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert ApiConfig().with_keys_read().api_keys == ()
    config = ApiConfig(api_keys=("given",), api_keys_file=str(file))
    assert config.with_keys_read().api_keys == ("given", "one", "two")
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert ApiConfig().with_keys_read().api_keys == ()
    monkeypatch.setenv(KEY_VARIABLE, "three")
    read = config.with_keys_read()
    assert (read.api_keys, read.api_keys_file) == (("given", "three", "one", "two"), None)
    assert read.with_keys_read() == read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "must be a file with a key in each line"),
        (b" \n\n", "must be a file with a key"),
        (b"\xff", "it is not UTF-8"),
    ],
)
def test_files_without_keys(tmp_path: Path, content: bytes | None, message: str):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message) as refused:
        ApiConfig(api_keys_file=str(file)).with_keys_read()
    assert refused.value.param == "api_keys_file"


def test_origins():
    right = ("*", "null", "https://a.example", "http://localhost:3000", "chrome-extension://abc", "http://[::1]:80")
    assert ApiConfig(allowed_origins=right).allowed_origins == right
    for wrong in ("https://a.example/", "a.example", "https://", "https://a b", "", "https://a.example?x", 5):
        with pytest.raises(UsageError, match=r"allowed_origins must be \* or origins such as https://example.com"):
            ApiConfig(allowed_origins=(wrong,))  # type: ignore[arg-type]


def parse(*arguments: str) -> EngineArgs:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    add_arguments(parser.add_argument_group("engine"), EngineArgs)
    return from_arguments(parser.parse_args(["model", *arguments]), EngineArgs)


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "model"])
def test_every_field_is_a_flag(name: str):
    values = {
        "tokenizer": "folder",
        "chat_template": "{{ messages }}",
        "load_format": "dummy",
        "dtype": "bfloat16",
        "device": "cuda",
        "gpu_memory_utilization": 0.25,
        "placement_timeout_s": 2.5,
        "snapkv_policy": "streaming",
        "generation_config": "vllm",
    }
    default = getattr(EngineArgs(model="model"), name)
    flag = "--" + name.replace("_", "-")
    if isinstance(default, bool):
        for value, words in ((True, [flag]), (False, ["--no-" + flag[2:]])):
            assert parse(*words) == EngineArgs(model="model", **{name: value})
    else:
        value = values.get(name, 300)
        assert parse(flag, str(value)) == EngineArgs(model="model", **{name: value})
    assert parse() == EngineArgs(model="model")


def test_what_requests_leave_open_is_as_the_model_says():
    recommended = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None, "do_sample": True, "eos_token_id": 2}
    model = read_config(CONFIG, recommended)
    assert dict(EngineArgs(model="m").resolve(model, "cpu").sampling_defaults) == {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
    }
    assert EngineArgs(model="m", generation_config="vllm").resolve(model, "cpu").sampling_defaults == ()
    for wrong in ({"temperature": -1}, {"top_p": "high"}, {"top_k": 1.5}, {"repetition_penalty": 0}):
        with pytest.raises(UsageError, match=f"generation_config.json: {next(iter(wrong))} must be"):
            read_config(CONFIG, wrong)
