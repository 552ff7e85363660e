"""Batch jobs' files: names of rows, Parquet, what one row asks for, and output that another run continues."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.batch_jobs import output as job_output
from deployments.batch_jobs.input import _head, find_files, read_input, read_lines
from deployments.batch_jobs.output import Job, JobOutput
from deployments.batch_jobs.rows import check_rows, request_of
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
    assert list(read_lines(found.rows[::-1]))[-1] == b'{"custom_id": "a", "id": "b"}\n'


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


DEEP = '{"custom_id": "deep", "prompt": ' + "[" * 5000 + "]" * 5000 + "}"


def test_a_byte_order_mark_says_nothing(tmp_path: Path):
    """At the start of a file, or where files were joined."""
    rows = [json.dumps({"custom_id": name, "prompt": "x"}).encode() for name in ("a", "b")]
    lines = [codecs.BOM_UTF8 + rows[0], codecs.BOM_UTF8, codecs.BOM_UTF8 + rows[1], b'{"prompt": "x"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    found = read_input(find_files(str(tmp_path)), tmp_path)
    assert [row.key for row in found.rows] == ["a", "b", "in.jsonl:4"]
    assert [line.strip() for line in read_lines(found.rows)] == [*rows, lines[3]]


@pytest.mark.parametrize(
    "row", [DEEP, json.dumps({"body": DEEP, "url": "/v1/completions"}), '{"id": 1' + "0" * 5000 + "}"]
)
def test_a_row_that_nothing_can_read(row: str, tmp_path: Path):
    """Its answer says so; the others have theirs."""
    write(tmp_path / "in.jsonl", row, {"prompt": "x"})
    found = read_input(find_files(str(tmp_path)), tmp_path)
    assert [row.key for row in found.rows] == ["in.jsonl:1", "in.jsonl:2"]
    check_rows(found, ["m"], NO_TOKENIZER)
    with pytest.raises((ApiError, msgspec.DecodeError)) as refusal:
        request_of(row.encode(), "m")
    assert error_of(refusal.value).status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "custom_id", "body", "url", "prompt", "model", "messages"]), inner)
    ),
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()) | st.text().map(str.encode))
def test_any_row_has_an_answer(row: bytes):
    """An error, perhaps, which can be written."""
    key, model = _head(row)
    for text in (key, model):
        assert text is None or msgspec.json.encode(text)
    try:
        request_of(row, "m")
    except Exception as error:
        found = error_of(error)
        assert (found.status, bool(msgspec.json.encode(found.detail))) == (400, True)


def test_a_file_whose_name_is_no_text(tmp_path: Path):
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_text('{"prompt": "x"}')
    found = read_input(find_files(str(tmp_path)), tmp_path)
    assert [row.key for row in found.rows] == ["\ufffd.jsonl:1"]
    assert msgspec.json.encode(Job("m", found.hashes))


# ---- all rows, before an engine starts

NO_TOKENIZER: Any = SimpleNamespace(
    apply_chat_template=lambda *messages: (_ for _ in ()).throw(UsageError("no chat template"))
)
"""As of a model without a chat template."""


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x", "model": "gpt-4o"},
        {"url": "/v1/completions", "body": BODY | {"model": "gpt-4o"}},
        {"url": "/v1/completions", "body": json.dumps(BODY | {"model": "gpt-4o"})},
        {"model": "gpt-4o"},
    ],
)
def test_rows_of_another_model(row: dict[str, Any], tmp_path: Path):
    write(tmp_path / "in.jsonl", {"prompt": "x", "model": "m"}, row, {"prompt": "x", "model": None}, row)
    found = read_input(find_files(str(tmp_path)), tmp_path)
    with pytest.raises(UsageError, match=r"^the row in\.jsonl:2 asks for the model 'gpt-4o', but this job's is 'm'"):
        check_rows(found, ["m"], NO_TOKENIZER)
    check_rows(found, ["m", "gpt-4o"], NO_TOKENIZER)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 5}, "prompt must be a text"),
        ({"prompt": "x", "max_token": 3}, "max_token is not supported"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no chat template"),
        ("{oops", "the row is not valid JSON"),
        (DEEP, "nested too deeply"),
    ],
)
def test_not_a_single_good_row(row: object, message: str, tmp_path: Path):
    write(tmp_path / "in.jsonl", row, row, "[]")
    files = find_files(str(tmp_path))
    with pytest.raises(
        UsageError, match=r"^not one of the 3 rows can be answered; the first, in\.jsonl:1: "
    ) as refusal:
        check_rows(read_input(files, tmp_path), ["m"], NO_TOKENIZER)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    write(tmp_path / "in.jsonl", row, row, {"prompt": "x"})
    check_rows(read_input(files, tmp_path), ["m"], NO_TOKENIZER)


def test_no_rows(tmp_path: Path):
    write(tmp_path / "in.jsonl", "", " ")
    with pytest.raises(UsageError, match="there are no rows"):
        check_rows(read_input(find_files(str(tmp_path)), tmp_path), ["m"], NO_TOKENIZER)


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
