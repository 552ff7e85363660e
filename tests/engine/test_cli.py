"""The commands, and `rayllm generate` and `rayllm chat` as a user runs them."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from engine_testing import eventually, is_alive

from rayllm.__main__ import main
from rayllm.frontend.tokenizer import Tokenizer

RAYLLM = [sys.executable, "-m", "rayllm"]
ENGINE = ["--device", "cpu", "--max-model-len", "256", "--block-size", "16", "--max-num-seqs", "4"]
EOS = 2
QUESTION = "What is gravity? Answer in one sentence."


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which the command fails, exit code 2."""
    try:
        code = main(list(arguments))
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    err = err.rpartition("\r")[2]  # a progress bar before it clears its line
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere.gguf", "--prompt", "a"], "no file nowhere.gguf"),
        (["chat", "no/such/folder"], "no model at 'no/such/folder'"),
        (
            ["generate", "m", "--prompt", "a", "--temperature", "-1"],
            "temperature must be a number from 0 to 100, not -1",
        ),
        (["generate", "m", "--prompt", "a", "--max-num-seqs", "0"], "max_num_seqs must be at least 1"),
        (["generate", "m", "--prompt", "a", "--max-num-seqs", "many"], "invalid int value: 'many'"),
        (["generate", "m", "--prompt", "a", "--dtype", "int3"], "invalid choice: 'int3'"),
        (
            ["generate", "m", "--max-tokens", "many", "--prompt", "a"],
            "max_tokens must be an integer, at least 1, or No",
        ),
        (["generate", "m", "--prompt", "a", "--system", "b", "--raw"], "--raw: not allowed with argument --system"),
        (["generate", "m", "another", "--prompt", "a"], "unexpected argument 'another' (`rayllm generate --help`"),
        (["chat", "m", "--n", "2"], "n must be 1 in a chat, which goes on from one answer, not 2"),
        (["chat", "m", "--seed", "x"], "argument --seed: invalid int value: 'x' (`rayllm chat --help`"),
        (["generate", "m", "--prompt", "a", "--skip-tokenizer-init"], "skip_tokenizer_init"),
        (["generate"], "required: model"),
        (["serve"], "required: model"),
        (["batch", "--model", "m"], "required: --input, --output"),
        ([], "required: COMMAND"),
        (["serf"], "'serf'"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert message in error_of(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "flag", "near"),
    [
        (
            ["generate", "m", "--prompt", "a", "--tensor-paralel-size", "2"],
            "--tensor-paralel-size",
            "--tensor-parallel-size",
        ),
        (["generate", "m", "--max_tokens=8"], "--max_tokens", "--max-tokens"),
        (["chat", "m", "--temprature", "1"], "--temprature", "--temperature"),
        (["chat", "m", "--no-enforce-eagr"], "--no-enforce-eagr", "--no-enforce-eager"),
        (["chat", "--sistem", "Be brief.", "m"], "--sistem", "--system"),
        (["serve", "m", "--prot", "80"], "--prot", "--port"),
        (["batch", "--modle", "m", "--input", "a", "--output", "b"], "--modle", "--model"),
        (["--verison"], "--verison", "--version"),
        (["generate", "m", "--xyzzy"], "--xyzzy", None),
    ],
)
def test_unknown_flags(capsys: pytest.CaptureFixture[str], arguments: list[str], flag: str, near: str | None):
    """The nearest one, and the subcommand's help."""
    command = " ".join(["rayllm", *arguments[:1]]).removesuffix(" --verison")
    hint = f": did you mean {near}?" if near else ""
    expected = f"Error: unknown flag {flag}{hint} (`{command} --help` lists what there is)\n"
    assert error_of(capsys, *arguments) == expected


def test_too_many_shards(capsys: pytest.CaptureFixture[str], smollm2: Path):
    error = error_of(capsys, "generate", str(smollm2), "--prompt", "a", "--tensor-parallel-size", "2")
    assert "cannot split 9 query heads" in error
    assert "use one of 1, 3" in error


def test_help(capsys: pytest.CaptureFixture[str]):
    for command in ([], ["generate"], ["chat"], ["serve"], ["batch"]):
        with pytest.raises(SystemExit) as end:
            main([*command, "--help"])
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert "usage: " + " ".join(["rayllm", *command]) in shown
        assert "None" not in shown


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_what_is_only_told_imports_little(flag: str):
    """Neither torch nor Ray."""
    code = f"""
import sys
from rayllm.__main__ import main
try:
    main(["{flag}"])
finally:
    print(*sorted({{"torch", "ray", "transformers"}} & sys.modules.keys()), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "\n"
    assert done.stdout.startswith(f"rayllm {version('rayllm')}\n" if flag == "--version" else "usage: rayllm [-h]")


def test_generate(engine_pool, ray_cluster: str, smollm2: Path, reference, capsys, monkeypatch):
    """A question on the command line, and raw text through a pipe; nothing but the answer goes to stdout."""
    engine_pool.make_room(1)
    command = ["generate", str(smollm2), *ENGINE, "--address", ray_cluster, "--max-tokens", "12"]
    asked = subprocess.run([*RAYLLM, *command, "--prompt", QUESTION], capture_output=True, text=True, timeout=120)
    assert asked.returncode == 0, asked.stderr
    assert "Traceback" not in asked.stderr
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time"))
    capsys.readouterr()
    assert main([*command, "--raw", "--stop", "city"]) == 0
    piped = capsys.readouterr().out
    tokenizer = Tokenizer.from_source(smollm2)
    chat = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}]), False)
    raw = tokenizer.encode("Once upon a time")
    for shown, prompt in ((asked.stdout, chat), (piped, raw)):
        text = tokenizer.decode(reference("smollm2").greedy(prompt, 12))
        assert ("city" in text) == (prompt is raw), "what the model is known to say"
        assert shown.startswith(text.partition("city")[0] + "\n\n")
        summary = rf"\n\n{len(prompt)} prompt tokens, \d+ output tokens, \d+ ms to the first token, [\d.]+ tokens/s\n$"
        assert re.search(summary, shown)
    assert ", 12 output tokens," in asked.stdout


class Terminal:
    """A command in a terminal of its own, where Ctrl-C reaches all that it started."""

    def __init__(self, command: list[str]):
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._output = b""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, end: str, timeout_s: float = 60) -> str:
        """What is shown up to and with `end`."""
        deadline = time.monotonic() + timeout_s
        while end.encode() not in self._output:
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"waited {timeout_s} s for {end!r} after {self._output.decode()}"
            try:
                self._output += os.read(self._master, 4096)
            except OSError:
                pytest.fail(f"it ended instead of showing {end!r}, after {self._output.decode()}")
        shown, _, self._output = self._output.partition(end.encode())
        return (shown + end.encode()).decode().replace("\r\n", "\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def session_of(pid: int) -> list[int]:
    """All processes that were started from the terminal of this one."""
    ids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [id for id in ids if is_alive(id) and os.getsid(id) == pid]


@pytest.mark.slow
def test_chat(smollm2: Path, reference):
    """Turns that build on each other; Ctrl-C stops an answer but not the chat; Ctrl-D ends it."""
    command = [*RAYLLM, "chat", str(smollm2), "--device", "cpu", "--max-model-len", "1024", "--max-tokens", "600"]
    terminal = Terminal([*command, "--system", "You are brief."])
    tokenizer = Tokenizer.from_source(smollm2)
    messages = [{"role": "system", "content": "You are brief."}]
    try:
        terminal.read_until("Ctrl-C stops an answer, Ctrl-D ends the chat.\r\n> ")
        for text in ("Hi!", "What is the capital of France?"):
            messages.append({"role": "user", "content": text})
            prompt = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
            output = reference("smollm2").greedy(prompt, 12)
            terminal.type(text + "\n")
            terminal.read_until(text + "\r\n")
            answer = terminal.read_until("\r\n\r\n> ").removesuffix("\n\n> ")
            assert answer.startswith(tokenizer.decode(output[: output.index(EOS)] if EOS in output else output))
            messages.append({"role": "assistant", "content": answer})
        terminal.type("Write a long story about a dragon.\n")
        terminal.read_until("dragon.\r\n")
        terminal.read_until(" ")
        terminal.type("\x03")
        assert len(terminal.read_until(" [stopped]\r\n\r\n> ")) < 1000
        terminal.type("Tell me of the rain. " * 100 + "\n")
        terminal.read_until("rain. \r\n")
        time.sleep(0.3)  # the line has been read, and its first token takes longer
        terminal.type("\x03")
        terminal.read_until("[stopped: the question is taken back]\r\n\r\n> ")
        terminal.type("/clear\n")
        terminal.read_until("/clear\r\n> ")
        time.sleep(0.5)  # Python loses a Ctrl-C between the prompt and the read
        terminal.type("\x03")
        terminal.read_until("> ")
        terminal.type("Bye!\n")
        assert len(terminal.read_until("\r\n\r\n> ")) > len("^CBye!\n\n\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
        eventually(lambda: not session_of(terminal.process.pid), seconds=5, what="the end of Ray's processes")
    finally:
        terminal.close()
