"""The engine on real GPUs, through Ray actors, against transformers on the same GPU."""

from __future__ import annotations

import json
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from pruned_reference import PrunedReference

from rayllm import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.timeout(600),
]

NUM_PROMPTS, OUTPUT_LEN = 12, 48


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Qwen3 of a real one's head shape, small in all else."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=5003,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=4096,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("qwen3")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(1)
    shared = [rng.randrange(5003) for _ in range(300)]
    prompts = [[rng.randrange(5003) for _ in range(rng.randint(1, 700))] for _ in range(NUM_PROMPTS - 3)]
    return prompts + [shared + prompt[:20] for prompt in prompts[:3]]


def reference(folder: str, prompts: list[list[int]], dtype: torch.dtype) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").cuda()
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT_LEN,
            min_new_tokens=OUTPUT_LEN,
            do_sample=False,
            use_cache=True,
        )
        outputs.append(output[0, len(prompt) :].tolist())
    del model
    torch.cuda.empty_cache()
    return outputs


@pytest.fixture(scope="module")
def float32_reference(model_folder: str, prompts: list[list[int]]) -> list[list[int]]:
    return reference(model_folder, prompts, torch.float32)


def generate(folder: str, prompts: list[list[int]], **arguments: object) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    arguments = {"kv_cache_memory_bytes": 2 << 30} | arguments
    with LLM(folder, skip_tokenizer_init=True, progress=False, **arguments) as llm:
        results = llm.generate(prompts, params, use_tqdm=False)
        if arguments["dtype"] == "float32":  # cached and in another batch
            again = llm.generate(prompts[:4], params, use_tqdm=False)
            assert [r["token_ids"] for r in again] == [r["token_ids"] for r in results[:4]]
    return [result["token_ids"] for result in results]


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 96, "max_num_seqs": 8}], ids=["whole", "chunked"])
def test_float32_equals_transformers(
    model_folder: str,
    prompts: list[list[int]],
    float32_reference: list[list[int]],
    tensor_parallel_size: int,
    enforce_eager: bool,
    limits: dict[str, int],
) -> None:
    if torch.cuda.device_count() < tensor_parallel_size:
        pytest.skip(f"needs {tensor_parallel_size} GPUs")
    outputs = generate(
        model_folder,
        prompts,
        dtype="float32",
        tensor_parallel_size=tensor_parallel_size,
        enforce_eager=enforce_eager,
        **limits,
    )
    assert outputs == float32_reference


def test_two_engines_on_one_host(
    model_folder: str, prompts: list[list[int]], float32_reference: list[list[int]]
) -> None:
    """Both at work at once, in one Ray, each on a GPU of its own."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    arguments = {"dtype": "float32", "kv_cache_memory_bytes": 2 << 30, "skip_tokenizer_init": True, "progress": False}
    with (
        LLM(model_folder, **arguments) as first,
        LLM(model_folder, **arguments) as second,
        ThreadPoolExecutor() as pool,
    ):
        answers = pool.map(lambda llm: llm.generate(prompts, params, use_tqdm=False), (first, second))
        outputs = [[result["token_ids"] for result in results] for results in answers]
    assert outputs == [float32_reference] * 2


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 128, "max_num_seqs": 8}], ids=["whole", "chunked"])
def test_pruned_caches(
    model_folder: str, prompts: list[list[int]], tensor_parallel_size: int, limits: dict[str, int]
) -> None:
    if torch.cuda.device_count() < tensor_parallel_size:
        pytest.skip(f"needs {tensor_parallel_size} GPUs")
    pruning = {"enable_snapkv": True, "snapkv_limit": 128, "snapkv_attn_sample_queries": 32}
    outputs = generate(
        model_folder, prompts, dtype="float32", tensor_parallel_size=tensor_parallel_size, **pruning, **limits
    )
    reference = PrunedReference(model_folder, window=32, device="cuda")
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output == reference.generate(prompt, 128, OUTPUT_LEN)


@pytest.mark.parametrize(
    "arguments", [{"enforce_eager": True}, {"snapkv_policy": "streaming"}], ids=["eager", "streaming"]
)
def test_pruned_caches_otherwise(model_folder: str, prompts: list[list[int]], arguments: dict[str, object]) -> None:
    pruning = {"enable_snapkv": True, "snapkv_limit": 128}
    outputs = generate(model_folder, prompts, dtype="float32", **pruning, **arguments)
    reference = PrunedReference(model_folder, window=32, device="cuda")
    policy = arguments.get("snapkv_policy", "snapkv")
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output == reference.generate(prompt, 128, OUTPUT_LEN, policy)


@pytest.fixture(params=["flash_attn_4", "triton"])
def prefill_op(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """With FlashAttention-4 as it is installed, and with one that cannot be imported in its place."""
    if request.param == "triton":
        (tmp_path / "flash_attn.py").write_text("raise ImportError('hidden by a test')")
        path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
        monkeypatch.setenv("PYTHONPATH", path)  # of the shards: they inherit it from the Ray that LLM starts
    elif find_spec("flash_attn") is None:
        pytest.skip("FlashAttention-4 is not installed")
    return request.param


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_bfloat16_agrees_with_transformers(
    model_folder: str, prompts: list[list[int]], tensor_parallel_size: int, prefill_op: str
) -> None:
    """bfloat16 has near-ties, after which two right answers part: most tokens before that must agree."""
    if torch.cuda.device_count() < tensor_parallel_size:
        pytest.skip(f"needs {tensor_parallel_size} GPUs")
    expected = reference(model_folder, prompts, torch.bfloat16)
    whole_gpu = {"kv_cache_memory_bytes": None}  # its cache takes longer to be filled than Python to go on
    outputs = generate(model_folder, prompts, dtype="bfloat16", tensor_parallel_size=tensor_parallel_size, **whole_gpu)
    agreed = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), OUTPUT_LEN)
        for x, y in zip(outputs, expected, strict=True)
    ]
    share = sum(agreed) / (len(prompts) * OUTPUT_LEN)
    print(f"bfloat16, {prefill_op}, TP {tensor_parallel_size}: {share:.1%} of tokens before the first difference")
    assert agreed.count(0) <= 2
    assert share > 0.3


def test_the_kernel_compiled_ahead_is_the_one_that_is_used(
    model_folder: str, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("flash_attn") is None:
        pytest.skip("needs FlashAttention-4")
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(tmp_path))
    for limits in ({}, {"max_num_batched_tokens": 96, "max_num_seqs": 8}):
        generate(model_folder, prompts, dtype="bfloat16", **limits)
    assert len(list(tmp_path.glob("rayllm-*-bfloat16-8-4-128-*"))) == 1
    assert len(list(tmp_path.glob("*/fwd/*.o"))) == 1


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vocabulary of bytes; the model's other tokens have no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("tensor_parallel_size", "enforce_eager"), [(1, False), (1, True), (2, False)])
def test_structured_answers(
    model_folder: str, byte_tokenizer: str, tensor_parallel_size: int, enforce_eager: bool
) -> None:
    """They keep to their grammars beside free ones, and are those that each gives alone."""
    if tensor_parallel_size > torch.cuda.device_count():
        pytest.skip("not enough GPUs")
    grammars: list[dict[str, object]] = [
        {"regex": "[a-c]{20}-[0-9]{9}"},
        {"json": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}},
        {"choice": ["red", "green"]},
    ]
    params = [
        SamplingParams(structured_outputs=None if i % 4 == 3 else grammars[i % 4], seed=i, max_tokens=60)  # type: ignore[arg-type]
        for i in range(64)
    ]
    arguments = {"tensor_parallel_size": tensor_parallel_size, "enforce_eager": enforce_eager, "dtype": "float32"}
    arguments["kv_cache_memory_bytes"] = 2 << 30
    with LLM(model_folder, tokenizer=byte_tokenizer, max_model_len=512, progress=False, **arguments) as llm:  # type: ignore[arg-type]
        answers = llm.generate([[i + 1, 5] for i in range(64)], params, use_tqdm=False)
        alone = [llm.generate([[i + 1, 5]], params[i], use_tqdm=False)[0] for i in range(8)]
    assert [one["token_ids"] for one in alone] == [answer["token_ids"] for answer in answers[:8]]
    assert all(re.fullmatch("[a-c]{20}-[0-9]{9}", answer["text"]) for answer in answers[::4])
    assert all(answer["text"] in ("red", "green") for answer in answers[2::4])
    for answer in answers[1::4]:
        assert answer["finish_reason"] == "length" or isinstance(json.loads(answer["text"])["n"], int)
    assert {len(answer["token_ids"]) for answer in answers[3::4]} == {60}
