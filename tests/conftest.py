"""What all tests share: a Ray cluster, models, and randomness that is fresh in every run and can be repeated."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_configs import LLAMA3_ROPE, SIZES
from xdist.scheduler import LoadScopeScheduling

pytest.register_assert_rewrite("shard_model")

pytest.register_assert_rewrite("shard_model")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # shards and references share few cores here
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # for tests/kernels, before anything imports Triton
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it, and so would what tests start

NUM_CPUS = 14  # of shards; the more fit, the fewer engines are started again


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=random.getrandbits(32), help="of the tests' random inputs")


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed {config.getoption('seed')}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start a Ray of their own run before this process is part of `ray_cluster`."""
    items.sort(key=lambda item: "ray_cluster" in getattr(item, "fixturenames", ()))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """With several workers, one runs tests/engine and one tests/serve, whose tests share Ray; the others go by file."""

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder = nodeid.split("/")[1]
            return folder if folder in ("engine", "serve") else nodeid.partition("::")[0]

    return ByFolder(config, log)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Each test's own; the same in every run with the same --seed."""
    return random.Random(f"{request.config.getoption('seed')} {request.path.name} {request.node.name}")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A Ray cluster of `NUM_CPUS` CPUs, of which this process is part; its address."""
    import ray

    context = ray.init("local", num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def smollm2(pytestconfig: pytest.Config) -> Path:
    """A real model, as a .gguf file."""
    path = pytestconfig.rootpath / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.fail(f"{path} is missing: run `make model`")
    return path


@pytest.fixture(scope="session")
def smollm2_folder(smollm2: Path) -> Path:
    """The same model as transformers reads it from the .gguf file, in float32; made once, it takes half a minute."""
    import torch
    import transformers

    folder = smollm2.parent / "smollm2-transformers"
    with open(smollm2.parent / "smollm2-transformers.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers want it
        if folder.exists():
            return folder
        auto = transformers.AutoModelForCausalLM
        read = auto.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
        del read.config.quantization_config  # it is no longer quantised
        model = auto.from_config(read.config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        with tempfile.TemporaryDirectory(dir=smollm2.parent) as parent:
            model.save_pretrained(Path(parent) / "model")
            (Path(parent) / "model").rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, Path]:
    """Folders of small models of random weights, by architecture; their greedy output is varied."""
    import torch
    import transformers

    common = SIZES | {"vocab_size": 199, "eos_token_id": None, "bos_token_id": None}
    configs = {
        "llama": transformers.LlamaConfig(**common, rope_parameters=LLAMA3_ROPE),
        "qwen2": transformers.Qwen2Config(**common | {"num_hidden_layers": 2}),
        "qwen3": transformers.Qwen3Config(**common | {"num_hidden_layers": 2}, head_dim=24, tie_word_embeddings=True),
    }
    folders = {}
    for name, config in configs.items():
        with torch.random.fork_rng():
            torch.manual_seed(pytestconfig.getoption("seed"))
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():  # biases begin as zeros, norms as ones
                if parameter.dim() == 1:
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def tiny_text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that is quick, with the vocabulary of SmolLM2's tokenizer."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny-text")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
