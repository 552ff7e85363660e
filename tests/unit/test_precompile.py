"""Compilation ahead of an engine, as far as a machine without a GPU goes."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_configs import SIZES

from rayllm.config import EngineArgs
from rayllm.models.config_json import read_config
from rayllm.runner import precompile

MODEL = read_config({"model_type": "llama", "vocab_size": 64, **SIZES})


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(precompile, "GPU_DRIVER", tmp_path)


def test_nothing_is_compiled_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch):
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("FlashAttention-4 is installed")
    config = EngineArgs(model="any", dtype="bfloat16").resolve(MODEL, "cuda")
    assert precompile.start(config, MODEL) is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4")
    monkeypatch.setattr(precompile, "GPU_DRIVER", Path("/nowhere"))
    assert precompile.start(config, MODEL) is None


def test_a_process_is_started_for_the_heads_of_a_shard(monkeypatch: pytest.MonkeyPatch):
    """Here it fails at once, for want of FlashAttention-4."""
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("FlashAttention-4 is installed")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4")
    config = EngineArgs(model="any", dtype="bfloat16", tensor_parallel_size=2, block_size=32).resolve(MODEL, "cuda")
    process = precompile.start(config, MODEL)
    assert process is not None
    assert process.args == [sys.executable, "-m", "rayllm.runner.precompile", "bfloat16", "2", "1", "16", "32"]
    assert process.wait(60) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert precompile.start(config, MODEL) is None


def test_a_process_that_is_not_needed_ends_at_once(monkeypatch: pytest.MonkeyPatch):
    """FlashAttention-4's version is looked up before anything is imported."""
    monkeypatch.setattr(sys, "argv", ["ahead", "bfloat16", "4", "4", "64", "16"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4")
    precompile._marker(sys.argv[1:]).touch()
    monkeypatch.setitem(sys.modules, "rayllm_kernels", None)  # to import it would fail
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "alarm", lambda seconds: None)  # of this process
        precompile.main()


def test_shards_wait_for_the_process_that_compiles():
    precompile.wait()  # there is none
    holder = f"from rayllm.runner import precompile\nwith precompile._lock({fcntl.LOCK_EX}): print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        waiters = [threading.Thread(target=precompile.wait) for _ in range(2)]
        for waiter in waiters:
            waiter.start()
            waiter.join(0.2)
            assert waiter.is_alive()
        process.kill()
        for waiter in waiters:
            waiter.join(10)
            assert not waiter.is_alive()
