"""The command lines: what `rayllm serve` and `serve run` refuse and say, and how they end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from deployments.openai_api import build_app
from serve.serve_testing import Service, eventually, free_port

TINY: dict[str, Any] = {"model": "org/tiny", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
RAYLLM = [sys.executable, "-m", "rayllm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["modle=x"], "unknown engine argument modle: did you mean model?"),
        ([], "model must be a model folder"),
        (["model=nowhere.gguf"], "no file nowhere.gguf"),
        (["model=SMOL", "tensor_parallel_size=two"], "tensor_parallel_size must be int, not 'two'"),
        (["model=SMOL", "tensor_parallel_size=2"], "tensor_parallel_size 2 cannot split 9 query heads"),
        (["model=SMOL", "max_queued_requests=-1"], "max_queued_requests must be at least 0, not -1"),
        (["model=SMOL", "skip_tokenizer_init=true"], "skip_tokenizer_init must be off"),
        (["model=SMOL", "api_keys=secret"], "api_keys must be list, not 'secret'"),
        (["model=SMOL", "max_model_len=99999"], "max_model_len must be at most 8192"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    smollm2: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    given = dict(argument.replace("SMOL", str(smollm2)).split("=") for argument in arguments)
    with pytest.raises(SystemExit) as ended:
        build_app(given | {"device": "cpu"})
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: {message}")


def test_serve_run_refuses_in_one_line():
    program = "from ray.serve.scripts import cli; cli()"
    command = [sys.executable, "-c", program, "run", "deployments.openai_api:build_app", "modle=x"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if "scripts.py" not in line]
    assert lines == ["Error: unknown engine argument modle: did you mean model?"]


@pytest.fixture
def command() -> Iterator[Any]:
    """Starts `rayllm serve`; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | variables
        process = subprocess.Popen([*RAYLLM, "serve", *arguments], text=True, env=environment, **streams)  # type: ignore
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


@pytest.mark.parametrize("with_haproxy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rayllm_serve_until_sigterm(command, tiny_text_model: Path, smollm2: Path, with_haproxy: bool):
    """Streams that run when the signal comes are finished, new requests get 503, and nothing is left."""
    port = free_port()
    arguments = [str(tiny_text_model), "--tokenizer", str(smollm2), "--port", str(port), "--device", "cpu"]
    arguments += ["--served-model-name", "org/tiny", "--block-size", "16", "--num-gpu-blocks-override", "200"]
    arguments += ["--log-requests"]
    url = f"http://127.0.0.1:{port}"
    if with_haproxy:
        open_host = ["--host", "0.0.0.0", "--api-replicas", "2"]
        process = command(*arguments, *open_host, RAY_SERVE_ENABLE_HA_PROXY="1")
    elif has_ipv6():
        process, url = command(*arguments, "--host", "::1"), f"http://[::1]:{port}"
    else:
        process = command(*arguments)
    began = time.monotonic()
    assert process.stdout is not None
    line = process.stdout.readline()
    told = re.fullmatch(rf"org/tiny is served at {re.escape(url)}/v1 \(started in (\d+) s\)\n", line)
    assert told, process.communicate()[1]
    assert abs(int(told[1]) - (time.monotonic() - began)) < 1.5, "counted from the command's start"
    logs = process.stdout.readline().removeprefix("Logs are in ").rstrip()
    assert list(Path(logs).glob("*.log"))
    service = Service(url, "rayllm")
    http = service.http
    wrong = http.post("/v1/completions", json=TINY | {"max_tokens": -1})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "max_tokens")
    for _ in range(4):  # of both processes, if there are two
        with http.stream("POST", "/v1/completions", json=TINY | {"max_tokens": 1900, "stream": True}) as response:
            next(response.iter_lines())
    service.assert_idle()
    with http.stream("POST", "/v1/completions", json=TINY | {"max_tokens": 500, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        eventually(lambda: http.get("/health").status_code == 503, 10, "the service to drain")
        refused = http.post("/v1/completions", json=TINY)
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the service is shutting down")
        assert [line for line in lines if line][-1] == "data: [DONE]"
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert "Waiting for 1 request to end, at most 60 s; a second signal ends at once\n" in out
    ended = r"\d\d:\d\d:\d\d id=\S+ model=org/tiny path=/v1/completions prompt_tokens=3 output_tokens=500 finish=length"
    assert len(re.findall(rf"^{ended} seconds=[\d.]+ status=200$", out, re.MULTILINE)) == 1
    assert len(re.findall(r"^\S+ id=\S+ model=- path=/v1/completions .* status=503$", out, re.MULTILINE)) == 1


@pytest.mark.slow
def test_a_second_signal_ends_at_once(command, host: str, tiny_model: dict[str, Any]):
    port = host.rpartition(":")[2]
    address = ray.get_runtime_context().gcs_address
    limits = ["--block-size", "16", "--num-gpu-blocks-override", "200", "--device", "cpu"]
    process = command(
        tiny_model["model"], "--tokenizer", tiny_model["tokenizer"], "--port", port, "--address", address, *limits
    )
    assert process.stdout is not None
    name = process.stdout.readline().split()[0]
    body = TINY | {"model": name, "max_tokens": 1900, "stream": True}
    with httpx.stream("POST", f"{host}/v1/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        lines = response.iter_lines()  # kept: without it, the connection closes
        next(lines)
        process.send_signal(signal.SIGINT)
        while not process.stdout.readline().startswith("Waiting for 1 request"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        signalled = time.monotonic()
        _, err = process.communicate(timeout=30)
        assert time.monotonic() - signalled < 10
    assert process.returncode == 130
    assert "Traceback" not in err
    eventually(lambda: "rayllm" not in serve.status().applications, 90, "the application to be gone")


@pytest.mark.slow
def test_rayllm_serve_refuses_in_one_line(command, deploy, tiny: Service, tiny_text_model: Path, smollm2: Path):
    taken = tiny.url.rpartition(":")[2].split("/")[0]
    common = [str(tiny_text_model), "--tokenizer", str(smollm2), "--device", "cpu"]
    address = ray.get_runtime_context().gcs_address
    elsewhere = ["--port", str(free_port()), "--address", address]
    too_small = ["--num-gpu-blocks-override", "3", "--port", taken, "--address", address]
    second = ["--port", taken, "--address", address]
    for arguments, message in (
        (["--port", taken], f"cannot listen at 127.0.0.1:{taken}"),
        (elsewhere, f"Serve runs on this cluster already, at 127.0.0.1:{taken}"),
        (too_small, "not enough memory for one sequence: max_model_len=2048 needs 16 KV cache blocks"),
        (second, "this cluster serves an application 'rayllm' already"),
    ):
        if arguments is second:
            first = deploy("rayllm", model=str(tiny_text_model), tokenizer=str(smollm2), num_gpu_blocks_override=200)
        start = time.monotonic()
        process = command(*common, *arguments)
        _, err = process.communicate(timeout=90)
        assert process.returncode == 2, err
        assert err.splitlines()[-1].startswith(f"Error: {message}"), err
        assert time.monotonic() - start < 90
    assert first.http.get("/health").status_code == 200


def test_haproxy_needs_an_open_host(smollm2: Path):
    environment = os.environ | {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
    command = [*RAYLLM, "serve", str(smollm2), "--port", str(free_port())]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("Error: RAY_SERVE_ENABLE_HA_PROXY makes Serve listen on all")
