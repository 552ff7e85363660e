"""The decoder against transformers, whole and split, and what ModelConfig accepts."""

import json
import random

import msgspec
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import transformers
from rayllm_kernels.rope import apply_rope_reference
from tiny_configs import LLAMA3_ROPE, SIZES

from rayllm.checkpoint.sources import resolve_model
from rayllm.checkpoint.weights import load_weights
from rayllm.errors import UsageError
from rayllm.model_config import KVGroup, ModelConfig
from rayllm.models.config_json import read_config
from rayllm.models.decoder import build_model
from rayllm.models.layers import RowParallelLinear, Split, rope_table
from rayllm.models.layers.formats import Blocked, Format, Plain
from rayllm.models.parallel import TensorParallel

LLAMA3 = LLAMA3_ROPE | {"rope_theta": 5e5}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, vocab_size=128, rope_parameters=LLAMA3, head_dim=32),
    "llama-bias": transformers.LlamaConfig(
        **SIZES, vocab_size=131, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "mistral": transformers.MistralConfig(**SIZES, vocab_size=128, head_dim=16, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**SIZES | {"num_key_value_heads": 1}, vocab_size=131),
    "qwen3": transformers.Qwen3Config(
        **SIZES, vocab_size=129, head_dim=32, tie_word_embeddings=True, rope_parameters=YARN
    ),
    "smollm3": transformers.SmolLM3Config(
        **SIZES, vocab_size=131, pad_token_id=None, no_rope_layer_interval=2, attention_bias=True, rope_parameters=YARN
    ),
}
TOLERANCE = {"rtol": 1e-4, "atol": 5e-4}  # of float32 logits that reach 10, against float32 ones


def attend(layer, q, k, v, rope):
    """Plain causal attention of one sequence."""
    q, k, v = (x.transpose(0, 1) for x in (*apply_rope_reference(q, k, rope), v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)


@torch.inference_mode()
def logits_of(folder, token_ids, tp=TensorParallel()):  # noqa: B008 (frozen)
    source = resolve_model(str(folder))
    model = build_model(source.config, tp, "cpu", torch.float32, max_model_len=256)
    load_weights(model, source, tp)
    hidden = model(token_ids, torch.arange(len(token_ids)), attend)
    assert hidden.shape == (len(token_ids), source.config.hidden_size)
    return tp.all_gather(model.compute_logits(hidden))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name → (folder, token ids, transformers' logits of them); one model sharded over several files."""
    made = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():  # biases begin as zeros, norms as ones
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder, max_shard_size="100KB" if name == "llama" else "1GB")
        token_ids = torch.randint(config.vocab_size, (100,))
        with torch.no_grad():
            made[name] = (folder, token_ids, model(token_ids[None]).logits[0])
    assert len(list(made["llama"][0].glob("*.safetensors"))) > 2
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(checkpoints, name):
    folder, token_ids, expected = checkpoints[name]
    torch.testing.assert_close(logits_of(folder, token_ids), expected, **TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_weights_give_the_same_logits(checkpoints, name):
    folder, token_ids, expected = checkpoints[name]
    source = resolve_model(str(folder))
    model = build_model(source.config, TensorParallel(), "cpu", torch.float32, max_model_len=256)
    load_weights(model, source, TensorParallel())
    model.pack()
    assert {type(module) for module in model.modules() if isinstance(module, Format)} == {Blocked}
    with torch.inference_mode():
        hidden = model(token_ids, torch.arange(len(token_ids)), attend)
        logits = model.compute_logits(hidden)
        out = torch.empty_like(logits)
        assert model.compute_logits(hidden, out) is out
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    assert torch.equal(out, logits)
    with pytest.raises(TypeError, match="cannot be loaded again"):
        list(model.weight_slices())


def test_weights_that_are_not_packed():
    """Only float32 on a CPU is copied."""
    plain = Plain.empty(8, 16, bias=True, dtype=torch.bfloat16)
    assert plain.pack() is plain


def run_rank(rank, size, folder, checkpoints):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    tp = TensorParallel(rank, size)
    torch.save({n: logits_of(f, ids, tp) for n, (f, ids, _) in checkpoints.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_compute_the_same(checkpoints, tmp_path):
    """Among the models: a KV head on both ranks, vocabularies that must be padded, biases after the sum."""
    mp.spawn(run_rank, (2, tmp_path, checkpoints), nprocs=2)
    for rank in range(2):
        for name, logits in torch.load(tmp_path / f"{rank}.pt").items():
            expected = checkpoints[name][2]
            vocab_size = expected.shape[1]
            assert logits.shape[1] == vocab_size + vocab_size % 2
            assert (logits[:, vocab_size:] == -torch.inf).all()
            torch.testing.assert_close(logits[:, :vocab_size], expected, **TOLERANCE)


def test_smollm2_equals_transformers(smollm2, reference):
    token_ids = torch.randint(49152, (50,))
    expected = reference("smollm2").logits(token_ids.tolist()).float()
    torch.testing.assert_close(logits_of(smollm2, token_ids), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
        LLAMA3,
        YARN,
        YARN | {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False},
    ],
)
def test_rope_table_equals_transformers(rope):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(**SIZES, head_dim=64, rope_parameters=rope)
    positions = torch.arange(256)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    expected = torch.cat((cos[0, :, :32], sin[0, :, :32]), dim=-1)
    table = rope_table(read_config(config.to_dict()), 256)
    torch.testing.assert_close(table, expected, **TOLERANCE)


def test_config_of_both_transformers_generations():
    common = {"model_type": "llama", "vocab_size": 99, **SIZES}
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    four = common | {"torch_dtype": "float16", "rope_theta": 5e5, "rope_scaling": scaling}
    five = common | {"dtype": "float16", "rope_parameters": LLAMA3}
    config = read_config(four | {"eos_token_id": 5}, {"eos_token_id": [7, 5]})
    assert config == read_config(five | {"eos_token_id": [5, 7]})
    assert config.eos_token_ids == (5, 7)
    assert config.dtype == "float16"
    assert config.head_dim == 16
    assert msgspec.json.decode(msgspec.json.encode(config), type=ModelConfig) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*Qwen3ForCausal"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic.*llama3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn.*bfloat16"),
    ],
)
def test_unsupported_configs_are_refused(changes, message):
    config = {"model_type": "llama", "vocab_size": 99, **SIZES}
    read_config(config)
    with pytest.raises(UsageError, match=message) as refused:
        read_config(config | changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("layer_types", "message"),
    [
        (["full_attention", "chunked_attention", "full_attention"], "unsupported layer_types chunked_attention"),
        (["full_attention"], "layer_types are 1, but num_hidden_layers is 3"),
    ],
)
def test_unsupported_layers_are_refused(layer_types, message):
    with pytest.raises(UsageError, match=message):
        read_config({"model_type": "qwen3", "vocab_size": 99, **SIZES, "layer_types": layer_types})


def test_layers_that_share_a_cache():
    """A window does not part them, since contexts stay within it."""
    config = read_config(
        {
            "model_type": "qwen3",
            "vocab_size": 99,
            **SIZES,
            "use_sliding_window": True,
            "sliding_window": 100,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        }
    )
    assert [layer.window for layer in config.layers] == [None, 100, None]
    assert config.max_model_len == 100
    assert config.kv_groups == (KVGroup((0, 1, 2)),)


def test_layers_that_are_not_rotated():
    """What an older config.json leaves out is as transformers has it; a window is only where nothing is rotated."""
    fields = {"model_type": "smollm3", "vocab_size": 99, **SIZES, "num_hidden_layers": 9}
    window = {"use_sliding_window": True, "sliding_window": 100}
    for changes in ({}, window, {"no_rope_layers": [0, 1, 1] * 4}, window | {"layer_types": ["full_attention"] * 9}):
        config, theirs = read_config(fields | changes), transformers.SmolLM3Config(**fields | changes)
        assert [layer.rotary for layer in config.layers] == [bool(kind) for kind in theirs.no_rope_layers[:9]]
        assert [layer.window is not None for layer in config.layers] == [
            kind == "sliding_attention" for kind in theirs.layer_types
        ]
        assert config.tie_word_embeddings == theirs.tie_word_embeddings
        assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    with pytest.raises(UsageError, match="no_rope_layers are 3, but num_hidden_layers is 9"):
        read_config(fields | {"no_rope_layers": [1, 1, 0]})


def test_sliding_windows():
    def window(**changes):
        config = read_config({"vocab_size": 9, **SIZES, **changes})
        return config.sliding_window, config.max_model_len

    assert window(model_type="mistral", sliding_window=100) == (100, 100)
    assert window(model_type="mistral", sliding_window=None) == (None, 256)
    assert window(model_type="qwen2", sliding_window=100) == (None, 256)
    mixed = {"model_type": "qwen2", "sliding_window": 100, "use_sliding_window": True}
    assert window(**mixed, max_window_layers=3) == (None, 256)
    assert window(**mixed, max_window_layers=None) == (None, 256)
    assert window(**mixed, max_window_layers=2) == (100, 100)


def test_tensor_parallel_sizes():
    config = read_config(
        {
            "model_type": "qwen2",
            "vocab_size": 10,
            **SIZES,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 8,
        }
    )
    fits = [1, 2, 4, 12]  # 3 and 6 fit the query heads alone
    for size in range(-1, 14):
        if size in fits:
            config.check_tensor_parallel(size)
            assert config.local_kv_heads(size) == max(1, 4 // size)
            assert config.kv_bytes_per_token(2, size) == 2 * 3 * config.local_kv_heads(size) * 8 * 2
        else:
            with pytest.raises(UsageError, match="tensor_parallel_size"):
                build_model(config, TensorParallel(0, size), "cpu", torch.float32, 16)


def test_dummy_weights(tmp_path):
    file = tmp_path / "shape.json"
    file.write_text(json.dumps({"model_type": "qwen3", "vocab_size": random.randint(50, 99), **SIZES}))
    source = resolve_model(str(file), load_format="dummy")
    assert source.tokenizer_path is None

    def parameters(rank):
        model = build_model(source.config, TensorParallel(rank, 2), "cpu", torch.bfloat16, 16)
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        assert load_weights(model, source, TensorParallel(rank, 2)) == 0
        return dict(model.named_parameters())

    first, again, other = parameters(0), parameters(0), parameters(1)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        else:
            assert 0.015 < parameter.float().std() < 0.025
            assert not torch.equal(parameter, other[name])


def test_sums_are_where_the_caller_says():
    """A sum that is written elsewhere than the ranks share, or there untold, is refused before it is summed."""
    tp = TensorParallel(0, 2, shared=torch.zeros(1 << 18))
    x = torch.zeros(256, 8)
    assert tp.summand(x[:10], 512) is None  # too small to be worth it
    assert tp.summand(x, 2048) is None  # too large for the memory
    summand = tp.summand(x, 1024)
    assert summand.shape == (256, 1024) and summand.data_ptr() == tp.shared.data_ptr()
    for wrong, in_summand in [(summand, False), (summand[:1], False), (summand.clone(), True), (summand[1:], True)]:
        with pytest.raises(RuntimeError, match="where a summand is written"):
            tp.all_reduce(wrong, in_summand=in_summand)
    with pytest.raises(RuntimeError, match="not where a summand is written"):
        TensorParallel(0, 2).all_reduce(x, in_summand=True)


def test_a_linear_that_writes_elsewhere_than_its_summand():
    class Elsewhere(Plain):
        def linear(self, x, out=None):
            return super().linear(x)

    tp = TensorParallel(0, 2, shared=torch.zeros(1 << 18))
    linear = RowParallelLinear("down_proj", Split.even(32, 0, 2), 1024, tp, bias=False, dtype=torch.float32)
    linear.format = Elsewhere(linear.format.weight)
    with pytest.raises(RuntimeError, match="not where a summand is written"):
        linear(torch.zeros(256, 16))
