"""Models in several .gguf files: read whole from the first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf_testing import BPE, MODEL, ROWS, write

from rayllm.checkpoint.gguf import converted, read_index
from rayllm.checkpoint.sources import resolve_model
from rayllm.errors import UsageError


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    first = write(tmp_path / "model.gguf", MODEL | BPE, parts=3)
    return [first, *(first.with_name(f"model-0000{number}-of-00003.gguf") for number in (2, 3))]


def test_a_model_in_parts(parts: list[Path], tmp_path: Path) -> None:
    whole = write(tmp_path / "model.gguf", MODEL | BPE)
    assert resolve_model(str(parts[0])).config == resolve_model(str(whole)).config
    index = read_index(parts[0])
    assert index.keys() == read_index(whole).keys()
    assert {tensor.part for tensor in index.values()} == {part.name for part in parts}
    for number, name in enumerate(ROWS):
        tensor = index[name]
        stored = np.fromfile(tmp_path / tensor.part, np.float32, 256, offset=tensor.offset)
        assert (stored == number).all()

    folder = converted(parts[0])
    assert converted(parts[0]) == folder
    parts[2].write_bytes(parts[2].read_bytes() + b"\0" * 32)
    assert converted(parts[0]) != folder


def test_a_link_to_the_first_part(parts: list[Path], tmp_path: Path) -> None:
    """As in the Hub's cache, where the files' own names say nothing."""
    (tmp_path / "blobs").mkdir()
    for number, part in enumerate(parts):
        part.symlink_to(part.rename(tmp_path / "blobs" / str(number)))
    source = resolve_model(str(parts[0]))
    assert source.path == str(parts[0])
    assert len(read_index(source.path)) == 1 + len(ROWS)


def test_parts_that_are_refused(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model-00002-of-00003.gguf is not the first .*: give model-00001-of-00003"):
        resolve_model(str(parts[1]))
    renamed = parts[1].rename(tmp_path / "model.gguf")
    with pytest.raises(UsageError, match=r"model.gguf is part 2 of 3: give the first, .* -00001-of-00003.gguf"):
        resolve_model(str(renamed))
    with pytest.raises(UsageError, match=r"model-00001-of-00003.gguf .*: model-00002-of-00003.gguf must be beside it"):
        resolve_model(str(parts[0]))
    parts[2].rename(parts[1])
    renamed.rename(parts[2])
    with pytest.raises(UsageError, match=r"model-00002-of-00003.gguf: split.no and split.count must be 1 and 3"):
        resolve_model(str(parts[0]))
    parts[1].write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"model-00002-of-00003.gguf is not a readable GGUF file"):
        resolve_model(str(parts[0]))
