"""Models behind a URL, with the file system in the place of a bucket."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from rayllm.checkpoint.bucket import PIECE_BYTES, fetch, folder_of
from rayllm.errors import UsageError
from rayllm.progress import Tracker, untracked

PATTERNS = ["*.json", "*.safetensors"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "a-model"
    (folder / "original").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(os.urandom(2 * PIECE_BYTES + 5))
    (folder / "weights.bin").write_text("pickled")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name[0] != "."}


def test_what_is_wanted_is_copied_once(model: Path) -> None:
    copy = fetch(model.as_uri(), PATTERNS[:1], untracked)
    assert contents(copy) == {"config.json": b"{}"}
    tracker = Tracker()
    assert fetch(model.as_uri(), PATTERNS, tracker.track) == copy
    assert tracker.progress.total == 3
    assert contents(copy) == {name: (model / name).read_bytes() for name in ("config.json", "weights.safetensors")}
    before = (copy / "weights.safetensors").stat()
    fetch(model.as_uri(), PATTERNS, untracked)
    assert (copy / "weights.safetensors").stat() == before
    (model / "config.json").write_text("[]")
    fetch(model.as_uri(), PATTERNS, untracked)
    assert contents(copy)["config.json"] == b"[]"
    assert (copy / "weights.safetensors").stat() == before


def test_a_single_file(model: Path) -> None:
    copy = fetch((model / "weights.bin").as_uri(), PATTERNS, untracked)
    assert copy.name == "weights.bin"
    assert copy.read_text() == "pickled"


def test_parts_of_a_gguf_file(model: Path) -> None:
    """All come with the first; nothing comes for another."""
    names = [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for name in names:
        (model / name).write_text(name)
    copy = fetch((model / names[0]).as_uri(), PATTERNS, untracked)
    assert copy.name == names[0]
    assert contents(copy.parent) == {name: name.encode() for name in names}
    url = (model / names[1]).as_uri()
    with pytest.raises(UsageError, match=f"give {names[0]}"):
        fetch(url, PATTERNS, untracked)
    assert contents(folder_of(url)) == {}


def _fetch_all(url: str) -> int:
    return (fetch(url, PATTERNS, untracked) / "weights.safetensors").stat().st_ino


def test_one_process_fetches_for_all(model: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(_fetch_all, [model.as_uri()] * 3))) == 1


def test_what_breaks_off_leaves_nothing_half(model: Path) -> None:
    def break_off(items, stage):
        yield items[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(model.as_uri(), PATTERNS, break_off)
    assert [file.name for file in folder_of(model.as_uri()).iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("url", "message"),
    [("file:///nowhere/at/all", "there is nothing at file"), ("gopher://a/b", "gopher://a/b cannot be read: ")],
)
def test_refusals(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        fetch(url, PATTERNS, untracked)
    assert "\n" not in str(refused.value)
