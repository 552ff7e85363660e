"""The engine's processes: one step ahead, killed, frozen, interrupted; and what they leave behind: nothing."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_testing import TIGHT, WHOLE, eventually, greedy, is_alive, pids_of, stats_of, tokens_of

import rayllm.engine.engine
from rayllm import LLM, EngineDeadError
from rayllm.checkpoint.sources import resolve_model
from rayllm.config import EngineArgs
from rayllm.engine.engine import Engine
from rayllm.engine.launcher import Launcher

ARGUMENTS: dict[str, Any] = WHOLE | {"device": "cpu", "skip_tokenizer_init": True, "progress": False}


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_the_next_step_is_sent_before_the_last_is_answered(engines, reference, rng, tensor_parallel_size: int):
    """With a shard frozen amid decoding, two steps are in flight, or three short ones; all count when it thaws."""
    llm = engines("llama", tensor_parallel_size, **WHOLE)
    before = stats_of(llm).num_steps
    prompt = [rng.randrange(199) for _ in range(9)]
    stream = llm.stream(prompt, greedy(100))
    output = [token_id for _ in range(3) for token_id in next(stream).token_ids]
    frozen = rng.choice(pids_of(llm)[1:])
    os.kill(frozen, signal.SIGSTOP)
    try:
        eventually(lambda: stats_of(llm).num_in_flight >= 2, seconds=10, what="two steps in flight")
        time.sleep(0.3)
        num_steps = stats_of(llm).num_steps
        time.sleep(0.3)
        stats = stats_of(llm)
        assert stats.num_in_flight in (2, 3)
        assert stats.num_steps == num_steps
        assert num_steps - before < 99, "it was frozen amid decoding"
    finally:
        os.kill(frozen, signal.SIGCONT)
    output += [token_id for increment in stream for token_id in increment.token_ids]
    reference("llama").check_greedy([prompt], [output], 100)


@pytest.fixture
def own_engine(engine_pool, model_paths) -> Iterator[Callable[..., LLM]]:
    """Starts an engine for this test alone."""
    started: list[LLM] = []

    def start(tensor_parallel_size: int, **arguments: Any) -> LLM:
        engine_pool.make_room(tensor_parallel_size)
        arguments = ARGUMENTS | {"tensor_parallel_size": tensor_parallel_size} | arguments
        started.append(LLM(str(model_paths["llama"]), **arguments))
        return started[-1]

    yield start
    for llm in started:
        llm.close()


def kill_shard(llm: LLM) -> str:
    os.kill(pids_of(llm)[-1], signal.SIGKILL)
    return "shard [01]"  # which may hear of it before the driver does


def kill_driver(llm: LLM) -> str:
    os.kill(pids_of(llm)[0], signal.SIGKILL)
    return "driver died"


def freeze_shard(llm: LLM) -> str:
    os.kill(pids_of(llm)[-1], signal.SIGSTOP)
    return "the shards have not answered a step for"


@pytest.mark.parametrize(
    ("harm", "tensor_parallel_size"),
    [
        (kill_driver, 1),
        pytest.param(kill_shard, 2, marks=pytest.mark.slow),
        pytest.param(freeze_shard, 1, marks=pytest.mark.slow),
    ],
)
def test_an_engine_is_started_again(
    own_engine,
    reference,
    rng,
    caplog: pytest.LogCaptureFixture,
    harm: Callable[[LLM], str],
    tensor_parallel_size: int,
):
    """Its requests go on where they were, whatever happened to it."""
    llm = own_engine(tensor_parallel_size, step_timeout_s=3.0 if harm is freeze_shard else None)
    pids = pids_of(llm)
    prompts = [[rng.randrange(199)] for _ in range(3)]
    streams = [llm.stream(prompt, greedy(100)) for prompt in prompts]
    outputs = [next(stream).token_ids for stream in streams]
    message = harm(llm)
    for stream, output in zip(streams, outputs, strict=True):
        output += [token_id for increment in stream for token_id in increment.token_ids]
    reference("llama").check_greedy(prompts, outputs, 100)
    assert re.search(f"{message}.*: the engine is started again", caplog.text)
    eventually(lambda: not any(map(is_alive, pids)), seconds=10, what="the first processes' end")


def test_an_engine_that_dies_too_often(own_engine, rng, monkeypatch: pytest.MonkeyPatch):
    """All its requests fail at once, each with one line, and nothing is left."""
    monkeypatch.setattr(rayllm.engine.engine, "MAX_RESTARTS", 0)
    llm = own_engine(2)
    pids = pids_of(llm)
    streams = [llm.stream([rng.randrange(199)], greedy(None)) for _ in range(3)]
    for stream in streams:
        next(stream)
    message = kill_shard(llm)
    start = time.monotonic()
    for stream in streams:
        with pytest.raises(EngineDeadError, match=message) as failure:
            list(stream)
        assert "\n" not in str(failure.value)
    with pytest.raises(EngineDeadError, match=message):
        llm.generate([[1]], use_tqdm=False)
    assert time.monotonic() - start < 10
    llm.close()
    eventually(lambda: not any(map(is_alive, pids)), seconds=10, what="the processes' end")


def sockets_of(*pids: int) -> set[Path]:
    return {path for pid in pids for path in Path("/tmp").glob(f"rayllm-*/{pid}")}


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rayllm"]


def test_close_leaves_nothing(own_engine, capfd):
    before = sockets_of(os.getpid()), engine_threads()
    with own_engine(2) as llm:
        pids = pids_of(llm)
        waiting = llm.stream([1], greedy(None))
        next(waiting)
        other_thread = ThreadPoolExecutor(1).submit(llm.generate, [[2]], greedy(None), use_tqdm=False)
        eventually(lambda: stats_of(llm).num_running == 2, seconds=30, what="both requests")
        assert all(map(is_alive, pids))
        assert len(sockets_of(*pids)) == 3
    with pytest.raises(EngineDeadError, match="closed"):
        other_thread.result(timeout=5)
    with pytest.raises(EngineDeadError, match="closed"):
        list(waiting)
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate([[1]], use_tqdm=False)
    llm.close()  # again
    eventually(lambda: not any(map(is_alive, pids)), seconds=5, what="the processes' end")
    assert (sockets_of(os.getpid(), *pids), engine_threads()) == before
    assert capfd.readouterr().err == ""


def test_an_exception_closes(own_engine):
    def use() -> None:
        with own_engine(1) as llm:
            pids.extend(pids_of(llm))
            next(llm.stream([1], greedy(None)))
            raise KeyError

    pids: list[int] = []
    with pytest.raises(KeyError):
        use()
    eventually(lambda: not any(map(is_alive, pids)), seconds=5, what="the processes' end")


def test_the_end_of_the_object_closes(model_paths, engine_pool):
    engine_pool.make_room(1)
    llm = LLM(str(model_paths["llama"]), **ARGUMENTS)
    pids = pids_of(llm)
    llm.generate([[1]], greedy(2), use_tqdm=False)
    del llm
    gc.collect()
    eventually(lambda: not any(map(is_alive, pids)), seconds=5, what="the processes' end")


def test_two_engines_at_once(engines, reference, rng):
    """Engines of different models run in one process and on one host."""
    first, second = engines("qwen2", 2, **TIGHT), engines("llama", 1, **WHOLE)
    prompts = [[rng.randrange(199) for _ in range(rng.randint(1, 60))] for _ in range(12)]
    outputs: dict[str, list[list[int]]] = {}

    def work(name: str, llm: LLM) -> None:
        outputs[name] = tokens_of(llm.generate(prompts, greedy(40), use_tqdm=False))

    threads = [threading.Thread(target=work, args=args) for args in (("qwen2", first), ("llama", second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, output in outputs.items():
        reference(name).check_greedy(prompts, output, 40)
    assert len(outputs) == 2


# Other processes that own an engine

SCRIPT = """
import json, sys
from rayllm import LLM, SamplingParams
model, arguments = json.loads(sys.argv[1])
sys.path.append("tests/engine")
from engine_testing import pids_of, stats_of

def say(**what):
    print(json.dumps(what), flush=True)

FOREVER = SamplingParams(max_tokens=None, ignore_eos=True, n=4)

def generate_for_ever(llm):
    while True:
        llm.generate([[1, 2, 3]] * 4, FOREVER, use_tqdm=False)
"""
INTERRUPTED = (
    SCRIPT
    + """
llm = LLM(model, **arguments)
say(pids=pids_of(llm))
try:
    generate_for_ever(llm)
except KeyboardInterrupt:
    tokens = llm.generate([[1]], SamplingParams(max_tokens=3), use_tqdm=False)[0]["token_ids"]
    say(tokens=len(tokens), running=stats_of(llm).num_running)
generate_for_ever(llm)
"""
)
OWNER = (
    SCRIPT
    + """
with LLM(model, **arguments) as llm:
    say(pids=pids_of(llm))
    generate_for_ever(llm)
"""
)


@pytest.fixture
def start_script(model_paths) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Runs a script in a process group of its own, as a terminal would; `arguments` are its engine's."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, **arguments: Any) -> subprocess.Popen[str]:
        given = json.dumps([str(model_paths["llama"]), ARGUMENTS | arguments])
        process = subprocess.Popen(
            [sys.executable, "-c", script, given],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    answer: dict[str, Any] = json.loads(line)
    return answer


@pytest.mark.slow
def test_ctrl_c_then_kill(start_script):
    """Ctrl-C reaches the whole process group, Ray's processes among them: only the requests end. SIGKILL ends all."""
    script = start_script(INTERRUPTED, tensor_parallel_size=2)
    pids = told(script)["pids"]
    time.sleep(1)
    os.killpg(script.pid, signal.SIGINT)
    assert told(script) == {"tokens": 3, "running": 0}
    assert all(map(is_alive, pids))
    script.kill()
    eventually(lambda: not any(map(is_alive, pids)), seconds=10, what="the processes' end")


@pytest.mark.slow
def test_a_killed_user_of_a_cluster_takes_its_engine_with_it(engine_pool, ray_cluster, start_script):
    engine_pool.make_room(1)
    script = start_script(OWNER, address=ray_cluster)
    pids = told(script)["pids"]
    time.sleep(0.5)
    assert all(map(is_alive, pids))
    script.kill()
    eventually(lambda: not any(map(is_alive, pids)), seconds=10, what="the processes' end")


def pids_of_shards() -> set[int]:
    """The shards of all engines in this process's cluster, those that start among them."""
    pids = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Shard"):
                pids.add(process.pid)
    return pids


def test_a_shard_that_dies_while_it_starts(engine_pool, model_paths: dict[str, Path]):
    engine_pool.make_room(1)
    source = resolve_model(str(model_paths["llama"]))
    args = EngineArgs(model=source.path, device="cpu", **WHOLE)
    others = pids_of_shards()

    def kill(_: object) -> None:
        for pid in pids_of_shards() - others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(EngineDeadError, match="failed to start: a shard died; Ray's logs"):
        Engine(Launcher.connect(args, source, None, progress=False), progress=False, report=kill)
