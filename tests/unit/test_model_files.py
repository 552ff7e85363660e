"""Model folders as people have them: damaged files, files that only point to others, code, no place for a cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import save_file
from tiny_configs import SIZES
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models, pre_tokenizers

from rayllm import caches
from rayllm.checkpoint import gguf
from rayllm.checkpoint.sources import resolve_model
from rayllm.errors import UsageError
from rayllm.frontend.tokenizer import Tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
IS_POINTER = "is a Git LFS pointer, not the file itself"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with one tensor in each of two files, and a tokenizer of one word."""
    for number in (1, 2):
        save_file({f"t{number}": np.zeros(4, np.float32)}, tmp_path / f"{number}.safetensors")
    backend = BackendTokenizer(models.WordLevel({"hello": 0, "<end>": 1}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    write(
        tmp_path,
        {
            "config.json": {"model_type": "llama", "vocab_size": 9, **SIZES},
            "generation_config.json": {"eos_token_id": 1},
            INDEX: {"metadata": {}, "weight_map": {"t1": "1.safetensors", "t2": "2.safetensors"}},
            "tokenizer.json": backend.to_str(),
            "tokenizer_config.json": {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"},
        },
    )
    return tmp_path


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, IS_POINTER),
        ('{"weight_map": {"t1": "1.saf', "is not readable JSON"),
        ("", "is not readable JSON"),
        ("[" * 100_000, "is not readable JSON"),
        ("[]", "must hold a JSON object"),
        ("null", "must hold a JSON object"),
    ],
)
def test_damaged_json(folder: Path, name: str, content: str, message: str):
    resolve_model(str(folder))
    write(folder, {name: content})
    assert refusal(folder).startswith(f"{folder}/{name} {message}")


def refusal(folder: Path) -> str:
    with pytest.raises(UsageError) as refused:
        resolve_model(str(folder))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"metadata": {}}, f"{INDEX} lacks weight_map"),
        ({"weight_map": ["1.safetensors"]}, f"{INDEX}: weight_map: expected `object`, got `array`"),
        ({"weight_map": {"t1": 5}}, f"{INDEX}: weight_map[...]: expected `str`, got `int`"),
        ({"weight_map": {"t1": "../1.safetensors"}}, f"{INDEX}: weight_map: '../1.safetensors' is no file of this"),
        ({"weight_map": {"t1": "3.safetensors"}}, "3.safetensors is missing"),
        ({"weight_map": {}}, "has no weights"),
    ],
)
def test_an_index_that_names_no_files(folder: Path, index: dict[str, Any], message: str):
    write(folder, {INDEX: index})
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER.encode(), IS_POINTER),
        (b"", "is damaged"),
        (b"\xff" * 64, "is damaged"),
        ((8).to_bytes(8, "little") + b"{nothing", "is damaged"),
        ((100).to_bytes(8, "little") + b"{}", "is damaged"),
    ],
)
@pytest.mark.parametrize("has_index", [True, False])
def test_damaged_weights(folder: Path, content: bytes, message: str, has_index: bool):
    """Found by their header, before an engine starts."""
    (folder / "2.safetensors").write_bytes(content)
    if not has_index:
        (folder / INDEX).unlink()
    assert refusal(folder).startswith(f"{folder}/2.safetensors {message}")


def test_a_gguf_file_that_is_a_pointer(tmp_path: Path):
    write(tmp_path, {"model.gguf": POINTER})
    assert IS_POINTER in refusal(tmp_path / "model.gguf")


# ---- tokenizers


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(POINTER, IS_POINTER), ('{"eos', "is not readable JSON"), ("[]", "must hold a JSON object")],
)
def test_damaged_files_of_a_tokenizer(folder: Path, name: str, content: str, message: str):
    write(folder, {name: content})
    with pytest.raises(UsageError, match=f"^{folder}/{name} {message}"):
        Tokenizer.from_source(folder)


def test_a_chat_template_that_is_a_pointer(folder: Path):
    write(folder, {"chat_template.jinja": POINTER})
    with pytest.raises(UsageError, match=f"^{folder}/chat_template.jinja {IS_POINTER}"):
        Tokenizer.from_source(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token", 5),
        ("chat_template", {"a": "b"}),
        ("added_tokens_decoder", [1]),
        ("additional_special_tokens", "x"),
        ("padding_side", "up"),
        ("model_input_names", None),
    ],
)
def test_fields_of_a_tokenizer(folder: Path, field: str, value: Any):
    write(folder, {"tokenizer_config.json": {field: value}})
    with pytest.raises(UsageError, match=f"^{folder}/tokenizer_config.json: {field}: ") as refused:
        Tokenizer.from_source(folder)
    assert "\n" not in str(refused.value)


def test_what_is_no_tokenizer(folder: Path):
    write(folder, {"tokenizer.json": {"model": 5}})
    with pytest.raises(UsageError, match=f"^no tokenizer at '{folder}'"):
        Tokenizer.from_source(folder)


CODE = "from pathlib import Path\nPath(__file__).with_name('it-ran').touch()\nclass Own: pass\n"
AUTO_MAPS: list[Any] = [{"AutoTokenizer": ["own.Own", None]}, {"AutoTokenizer": "own.Own"}, ["own.Own", "own.Own"]]


@pytest.mark.parametrize("tokenizer_class", ["Own", "OwnFast", "LlamaTokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("auto_map", AUTO_MAPS)
def test_no_code_is_run(folder: Path, auto_map: Any, tokenizer_class: str, monkeypatch: pytest.MonkeyPatch):
    """Nor asked about: tokenizer.json suffices, whatever class is to read it."""
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"it asks: {prompt}"))
    own = {"tokenizer_class": tokenizer_class, "auto_map": auto_map, "eos_token": "<end>"}
    config = {"model_type": "llama", "vocab_size": 9, **SIZES, "auto_map": {"AutoConfig": "own.Own"}}
    write(folder, {"own.py": CODE, "tokenizer_config.json": own, "config.json": config})
    resolve_model(str(folder))
    tokenizer = Tokenizer.from_source(folder)
    assert (tokenizer.encode("hello"), tokenizer.eos_token_ids) == ([0], (1,))
    (folder / "tokenizer.json").unlink()
    if tokenizer_class in ("Own", "OwnFast"):
        config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
        write(folder, {"config.json": config, "tokenizer.model": "code knows how to read this"})
        with pytest.raises(UsageError, match="no tokenizer at"):
            Tokenizer.from_source(folder)
    assert not (folder / "it-ran").exists()


# ---- caches


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder cannot be written, as for a container's user whom nobody knows; returns the temporary one."""
    monkeypatch.setenv("HOME", "/proc")  # not even root can
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name in (caches.TRITON, caches.FLASH_ATTENTION, "TRITON_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")  # and so restored afterwards
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary" / f"cache-rayllm-{os.getuid()}"


def test_a_conversion_goes_where_it_can(smollm2: Path, no_home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gguf, "_convert", lambda file, folder, progress: (folder / "config.json").touch())
    folder = gguf.converted(smollm2)
    assert folder.parent == no_home / "gguf"
    monkeypatch.setattr(gguf, "_convert", None)
    assert gguf.converted(smollm2) == folder, "found again"


def test_no_cache_at_all(smollm2: Path, no_home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    with pytest.raises(
        UsageError, match=r"no cache can be written in /proc/\.cache/rayllm or /proc/cache-rayllm-"
    ) as refused:
        gguf.converted(smollm2)
    assert "\n" not in str(refused.value)


def test_a_temporary_folder_of_somebody_else(no_home: Path, monkeypatch: pytest.MonkeyPatch):
    no_home.mkdir(parents=True)
    assert caches.writable_cache("gguf") == no_home / "gguf"
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    no_home.rename(no_home.with_name("cache-rayllm-12345"))
    with pytest.raises(UsageError, match="no cache can be written"):
        caches.writable_cache("gguf")


def test_libraries_that_compile_get_a_cache(no_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(caches, "getuser", lambda: {}["nobody"])  # as of Python 3.11 for such a user
    caches.use_writable_caches()
    assert os.environ[caches.TRITON] == f"{no_home}/triton"
    assert os.environ[caches.FLASH_ATTENTION] == f"{no_home}/flash_attention"
    monkeypatch.setenv(caches.TRITON, str(tmp_path / "own"))
    monkeypatch.setenv(caches.FLASH_ATTENTION, str(tmp_path / "own"))
    caches.use_writable_caches()
    assert os.environ[caches.TRITON] == os.environ[caches.FLASH_ATTENTION] == str(tmp_path / "own")


def test_a_download_goes_where_it_can(no_home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What the Hub's own cache has is used even if it cannot be written."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/proc/hub")
    calls = []

    def download(repo: str, local_files_only: bool = False, cache_dir: Path | None = None, **patterns: Any) -> str:
        calls.append((local_files_only, cache_dir))
        if local_files_only and len(calls) == 1:
            raise LocalEntryNotFoundError("not here")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for _ in range(2):
        assert resolve_model("owner/name", progress=False).origin == "owner/name"
    assert calls == [(True, None), (False, no_home / "hub"), (True, None)]
