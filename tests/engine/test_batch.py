"""Batch jobs as a user runs them: through `ray job submit` on a cluster with tokens, and refused."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_testing import eventually

from deployments.batch_jobs.engine import MAX_RESTARTS, Slots
from rayllm.__main__ import main
from rayllm.engine import placement
from rayllm.errors import EngineDeadError

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
BAD = {
    3: {"prompt": "a", "max_tokens": 0},
    77: {"prompt": "a", "colour": "red"},
    200: "{oops",
    333: {"messages": [{"role": "nobody", "content": "a"}]},
    499: {"prompt": "a " * 3000},
}
ENGINE = ["--device", "cpu", "--max-num-seqs", "16", "--block-size", "16", "--kv-cache-memory-bytes", str(1 << 24)]


class Head:
    """The head node of a cluster of its own, with tokens and a job server."""

    def __init__(self, folder: Path):
        with (
            socket.create_server(("", 0)) as one,
            socket.create_server(("", 0)) as two,
            socket.create_server(("", 0)) as three,
        ):
            port, dashboard, agent = (server.getsockname()[1] for server in (one, two, three))
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",  # for `ray job`
        }
        options = (
            f"--port={port} --dashboard-port={dashboard} --dashboard-agent-listen-port={agent} "
            f"--temp-dir={folder} --num-cpus=2 --num-gpus=0 --disable-usage-stats"
        )
        self._log = folder / "head.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [BIN / "ray", "start", "--head", "--block", *options.split()],
                env={name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"},
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=folder,  # where jobs start, too: not where rayllm could be imported from
            )
        eventually(self._has_started, seconds=60, what="the head node")

    def _has_started(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        return "Ray runtime started" in self._log.read_text()

    def job(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "ray", "job", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=200,
            cwd=self._log.parent,
            check=False,
        )

    def processes(self, what: str) -> list[psutil.Process]:
        """Those of its cluster whose command line fits."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if re.search(what, " ".join(process.cmdline())):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def close(self) -> None:
        family = psutil.Process(self._process.pid).children(recursive=True)
        os.killpg(self._process.pid, signal.SIGKILL)
        for process in family:
            if process.is_running():
                process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # paths of sockets end at 107 bytes
        head = Head(Path(folder))
        yield head
        head.close()


def write_rows(path: Path) -> None:
    rows: list[Any] = []
    for i in range(500):
        body = {"max_tokens": 10, "temperature": 0, "ignore_eos": True}
        if i % 3 == 0:
            chat = body | {"messages": [{"role": "user", "content": f"Number {i}"}]}
            rows.append({"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": chat})
        else:
            rows.append(body | {"prompt": f"Number {i}"} | ({"id": f"p{i}"} if i % 3 == 1 else {}))
    for i, bad in BAD.items():
        rows[i] = bad
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def lines(folder: Path) -> list[str]:
    return [line for part in sorted(folder.glob("part-*.jsonl")) for line in part.read_text().splitlines()]


ENGINE_PROCESSES = r"^ray::(Driver|Shard|MapWorker)"


@pytest.mark.slow
def test_a_job_that_is_killed_and_continued(
    head: Head, tiny_text_model: Path, smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """First with the rayllm of the nodes, then with one that comes with the job."""
    write_rows(tmp_path / "in.jsonl")
    out = tmp_path / "out"
    command = ["python", "-m", "rayllm", "batch", "--model", str(tiny_text_model), "--tokenizer", str(smollm2), *ENGINE]
    command += ["--input", str(tmp_path / "in.jsonl"), "--output", str(out)]

    submitted = head.job("submit", "--no-wait", "--", *command)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    eventually(lambda: any(out.glob("part-*")), 90, "answers")
    assert head.processes(ENGINE_PROCESSES)
    [driver] = head.processes(r"^\S*python\S* -m rayllm batch")
    driver.kill()
    eventually(lambda: not head.processes(ENGINE_PROCESSES), seconds=20, what="the end of the engine's processes")
    first = lines(out)
    assert 0 < len(first) < 500

    modules = [str(ROOT / folder) for folder in ("rayllm", "deployments", "kernels/rayllm_kernels")]
    runtime_env = json.dumps({"py_modules": modules})
    show = "import rayllm, deployments, rayllm_kernels as k; print(rayllm.__file__, deployments.__file__, k.__file__)"
    both = f"python -c '{show}' && exec {' '.join(command)}"
    done = head.job("submit", "--runtime-env-json", runtime_env, "--", "bash", "-c", both)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("py_modules_files") == 3
    assert "495 answers and 5 errors" in done.stdout
    second = lines(out)
    assert second[: len(first)] == first

    answers = {answer["custom_id"]: answer for answer in map(json.loads, second)}
    assert len(second) == len(answers) == 500
    places = {i: f"c{i}" if i % 3 == 0 else f"p{i}" if i % 3 == 1 else f"in.jsonl:{i + 1}" for i in range(500)}
    assert set(answers) == {f"in.jsonl:{i + 1}" if i in BAD else place for i, place in places.items()}
    failed = {key: answer["error"]["message"] for key, answer in answers.items() if answer["error"]}
    assert set(failed) == {f"in.jsonl:{i + 1}" for i in BAD}
    assert "max_tokens" in failed["in.jsonl:4"]
    assert "colour is not supported" in failed["in.jsonl:78"]
    assert "not valid JSON" in failed["in.jsonl:201"]
    assert "2047 leave room" in failed["in.jsonl:500"]
    for key, answer in answers.items():
        response = answer["response"]
        assert response["status_code"] == (400 if key in failed else 200)
        if key not in failed:
            assert response["body"]["object"] == ("chat.completion" if key[0] == "c" else "text_completion")
            assert response["body"]["usage"]["completion_tokens"] == 10

    assert main(command[3:]) == 0, "without an engine"
    assert "495 answers and 5 errors" in capsys.readouterr().out
    assert lines(out) == second


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which the command fails, exit code 2."""
    try:
        code = main(["batch", *arguments])
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err.rpartition("\r")[2]
    assert code == 2
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    return err


def test_refusals(capsys: pytest.CaptureFixture[str], tiny_text_model: Path, smollm2: Path, tmp_path: Path):
    """Before Ray is started."""
    file = tmp_path / "in.jsonl"
    file.write_text('{"id": "a", "prompt": "a"}\n{"id": "a", "prompt": "b"}\n')
    common = ["--input", str(file), "--output", str(tmp_path / "out"), "--tokenizer", str(smollm2)]
    model = ["--model", str(tiny_text_model)]
    assert "required: --model" in error_of(capsys, *common)
    assert "no model at 'nowhere'" in error_of(capsys, *common, "--model", "nowhere")
    assert "no input at 'nowhere*'" in error_of(capsys, *common, *model, "--input", "nowhere*")
    assert "num_engines must be at least 1" in error_of(capsys, *common, *model, "--num-engines", "0")
    assert "'a' stands twice: see in.jsonl" in error_of(capsys, *common, *model)
    assert "is no output of a batch job" in error_of(capsys, *common, *model, "--output", str(tmp_path))
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "model": "gpt-4o"}\n')
    assert "in.jsonl:2 asks for the model 'gpt-4o'" in error_of(capsys, *common, *model)
    file.write_text('{"prompt": 5}\n{oops\n')
    assert "not one of the 2 rows can be answered; the first, in.jsonl:1: prompt" in error_of(capsys, *common, *model)
    file.write_text("")
    assert "there are no rows in the input" in error_of(capsys, *common, *model)


@pytest.mark.slow
def test_a_job_whose_rows_all_fail(
    engine_pool,
    ray_cluster: str,
    capsys: pytest.CaptureFixture[str],
    tiny_text_model: Path,
    smollm2: Path,
    tmp_path: Path,
):
    """Has an exit code of its own, each time; what nothing can read is its row's affair."""
    engine_pool.make_room(1)
    deep = '{"custom_id": "deep", "prompt": ' + "[" * 5000 + "]" * 5000 + "}"
    (tmp_path / "in.jsonl").write_text(
        "\ufeff" + json.dumps({"custom_id": "long", "prompt": "a " * 3000}) + f"\n{deep}\n"
    )
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"), "--address", ray_cluster]
    command = ["batch", *files, "--model", str(tiny_text_model), "--tokenizer", str(smollm2), *ENGINE]
    for _ in range(2):
        assert main(command) == 3
        shown = capsys.readouterr()
        assert shown.out.startswith("0 answers and 2 errors in ")
        assert shown.err.splitlines()[-1] == "Error: all 2 rows failed: their answers say why"
        assert "Traceback" not in shown.err
    answers = {answer["custom_id"]: answer["error"]["message"] for answer in map(json.loads, lines(tmp_path / "out"))}
    assert set(answers) == {"long", "in.jsonl:2"}
    assert "nested too deeply" in answers["in.jsonl:2"]


@pytest.mark.slow
def test_an_engine_that_cannot_start(
    engine_pool,
    ray_cluster: str,
    capsys: pytest.CaptureFixture[str],
    tiny_text_model: Path,
    smollm2: Path,
    tmp_path: Path,
):
    """What its process dies of is told in one line, not as Ray Data's traceback."""
    engine_pool.make_room(1)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"), "--address", ray_cluster]
    model = ["--model", str(tiny_text_model), "--tokenizer", str(smollm2), "--device", "cpu"]
    assert main(["batch", *files, *model, "--num-gpu-blocks-override", "3"]) == 2
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].startswith("Error: not enough memory for one sequence: ")
    assert "Traceback" not in shown


def test_ray_data_is_missing():
    code = "import sys; sys.modules['pyarrow'] = None; from rayllm.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "batch", "--model", "m", "--input", "i", "--output", "o"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "Error: batch jobs need Ray Data: pip install 'rayllm[batch]'\n")


def test_slots(engine_pool):
    """Each process has its own group, the same when it comes back; one that comes back too often is refused."""
    engine_pool.make_room(2)
    groups = placement.reserve_all(2, 1, "cpu", placement_timeout_s=30, progress=False)
    slots = Slots(groups)
    assert {slots.claim(owner, "elsewhere").id for owner in ("a", "b")} == {group.id for group in groups}
    first = slots.claim("a", "elsewhere")
    for _ in range(MAX_RESTARTS - 1):
        assert slots.claim("a", "elsewhere").id == first.id
    with pytest.raises(EngineDeadError, match=f"died {MAX_RESTARTS + 1} times"):
        slots.claim("a", "elsewhere")
    for group in groups:
        placement.release(group)
