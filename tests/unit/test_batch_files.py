"""Batch jobs' files: names of rows, Parquet, what one row asks for, and output that another run continues."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pyarrow
import pyarrow.parquet
import pytest

from deployments.batch_jobs import output as job_output
from deployments.batch_jobs.engine import request_of
from deployments.batch_jobs.input import find_files, read_input, read_lines
from deployments.batch_jobs.output import Job, JobOutput
from deployments.http import ApiError, error_of
from deployments.protocol import ChatRequest, CompletionRequest
from rayllm.errors import UsageError


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_names_of_rows(tmp_path: Path):
    """Their own, as text; else those of their places, blank lines counted."""
    rows = [{"custom_id": "a", "id": "b"}, {"id": 7}, "", {"prompt": "x"}, "{broken", {"custom_id": ["a"]}, [1]]
    file = write(tmp_path / "in.jsonl", *rows)
    found = read_input(find_files(str(file)), tmp_path)
    assert [row.key for row in found.rows] == ["a", "7", *(f"in.jsonl:{number}" for number in (4, 5, 6, 7))]
    assert read_lines(found.rows[::-1])[-1] == b'{"custom_id": "a", "id": "b"}\n'


def test_folders_and_globs(tmp_path: Path):
    for name in ("b.jsonl", "a.jsonl", "other.txt", "sub/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, {"prompt": name})
    assert list(find_files(str(tmp_path))) == ["a.jsonl", "b.jsonl"]
    assert find_files(f"{tmp_path}/sub/*.jsonl") == {"a.jsonl": tmp_path / "sub" / "a.jsonl"}
    assert list(find_files(f"{tmp_path}/[as]*")) == ["a.jsonl"]
    with pytest.raises(UsageError, match=r"no input at .*nothing"):
        find_files(str(tmp_path / "nothing*"))


def test_two_rows_of_one_name(tmp_path: Path):
    write(tmp_path / "a.jsonl", {"id": "x"}, {"id": "y"})
    write(tmp_path / "b.jsonl", {"id": "z"}, {"custom_id": "y"})
    with pytest.raises(UsageError, match=r"'y' stands twice: see a\.jsonl and b\.jsonl"):
        read_input(find_files(str(tmp_path)), tmp_path)


def test_parquet(tmp_path: Path):
    """Columns are fields, nulls are absent; a body may be a text."""
    rows = [
        {"custom_id": "a", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
        {"custom_id": "b", "prompt": "Hi", "temperature": 0.5},
        {"custom_id": None, "url": "/v1/completions", "body": '{"prompt": "Hi", "snapkv_limit": "all"}'},
    ]
    names = {name for row in rows for name in row}
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    found = read_input(find_files(str(tmp_path / "in.parquet")), tmp_path)
    assert [row.key for row in found.rows] == ["a", "b", "in.parquet:3"]
    (_, chat), (_, plain), (_, body) = (request_of(line, "m") for line in read_lines(found.rows))
    assert isinstance(chat, ChatRequest) and (chat.max_tokens, chat.temperature) == (3, None)
    assert isinstance(plain, CompletionRequest) and (plain.prompt, plain.temperature) == ("Hi", 0.5)
    assert isinstance(body, CompletionRequest) and body.snapkv_limit == "all"

    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"bad\.parquet is not readable Parquet") as refusal:
        read_input(find_files(str(tmp_path / "bad.parquet")), tmp_path)
    assert "\n" not in str(refusal.value)


BODY = {"prompt": "Hi"}


@pytest.mark.parametrize(
    ("row", "message", "param"),
    [
        ("{oops", "the row is not valid JSON", None),
        ('"text"', "a row must be a JSON object", None),
        ({}, "a prompt or messages", "prompt"),
        ({"prompt": "a", "messages": []}, "one of them", "prompt"),
        ({"prompt": "a", "max_token": 3}, "max_token is not supported", "max_token"),
        ({"prompt": "a", "max_tokens": "3"}, "max_tokens: expected `int | null`, got `str`", "max_tokens"),
        ({"prompt": "a", "stream": True}, "stream must be left out", "stream"),
        ({"custom_id": [], "prompt": "a"}, "custom_id must be a text", "custom_id"),
        ({"url": "/v1/embeddings", "body": BODY}, "not POST /v1/embeddings", "url"),
        ({"body": BODY}, "not POST None", "url"),
        ({"url": "/v1/completions", "method": "GET", "body": BODY}, "not GET /v1/completions", "url"),
        ({"url": "/v1/completions", "body": BODY, "max_tokens": 3}, "max_tokens must be in the body", "max_tokens"),
        ({"url": "/v1/completions", "body": [BODY]}, "body must be a JSON object", "body"),
        ({"url": "/v1/chat/completions", "body": BODY}, "prompt is not supported", "prompt"),
    ],
)
def test_bad_rows(row: object, message: str, param: str | None):
    with pytest.raises((ApiError, msgspec.ValidationError)) as refusal:
        request_of((row if isinstance(row, str) else json.dumps(row)).encode(), "m")
    detail = error_of(refusal.value).detail
    assert message in detail.message
    assert detail.param == param


def test_model_of_rows():
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": BODY}
    assert request_of(json.dumps(row).encode(), "m")[1].model == "m"
    assert request_of(json.dumps(row | {"body": BODY | {"model": "other"}}).encode(), "m")[1].model == "other"


# ---- output

JOB = Job("m", {"in.jsonl": "1234"})


def line(key: str, error: str | None = None) -> bytes:
    return json.dumps({"custom_id": key, "error": {"message": error} if error else None}).encode()


def contents(folder: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for part in sorted(folder.glob("part-*")) for line in part.open()]


def test_output_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_output, "PERIOD_S", 0)
    monkeypatch.setattr(job_output, "PERIOD_SHARE", 0)
    folder = tmp_path / "new" / "out"
    with JobOutput(folder) as output:
        output.begin(JOB)
        output.add(["a", "b"], [line("a"), line("b", "bad")], num_failed=1)
        assert contents(folder) == ["a", "b"], "written at once"
        with pytest.raises(UsageError, match="another batch job is writing"), JobOutput(folder):
            pass
        monkeypatch.setattr(job_output, "PERIOD_S", 100)
        output.add(["c"], [line("c")], num_failed=0)
        assert contents(folder) == ["a", "b"], "it is not time yet"
        (output.spool / "part-000007.jsonl").write_bytes(b'{"custo')  # of a run that was killed while it wrote
    with JobOutput(folder) as output:
        output.begin(JOB)
        assert (output.done, output.num_failed) == ({"a", "b", "c"}, 1)
        output.add(["d"], [line("d")], num_failed=0)
    assert contents(folder) == ["a", "b", "c", "d"]
    assert not (folder / "tmp").exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Job("m", {"in.jsonl": "5678"}), "belongs to other input"),
        (Job("m2", JOB.input), "has answers of the model m:"),
    ],
)
def test_output_of_another_job(tmp_path: Path, other: Job, message: str):
    with JobOutput(tmp_path) as output:
        output.begin(JOB)
    with pytest.raises(UsageError, match=message), JobOutput(tmp_path) as output:
        output.begin(other)


def test_a_folder_of_something_else(tmp_path: Path):
    file = write(tmp_path / "file", {})
    for folder in (tmp_path, file):
        with pytest.raises(UsageError, match="no output of a batch job"), JobOutput(folder):
            pass
    assert list(tmp_path.iterdir()) == [file]
