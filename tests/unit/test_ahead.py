"""Compilation ahead of an engine, as far as a machine without a GPU goes."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rayllm import ahead


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(ahead, "GPU_DRIVER", tmp_path)


def test_shards_wait_for_the_process_that_compiles():
    ahead.wait()  # there is none
    holder = f"from rayllm import ahead\nwith ahead._lock({fcntl.LOCK_EX}): print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        waiters = [threading.Thread(target=ahead.wait) for _ in range(2)]
        for waiter in waiters:
            waiter.start()
            waiter.join(0.2)
            assert waiter.is_alive()
        process.kill()
        for waiter in waiters:
            waiter.join(10)
            assert not waiter.is_alive()
