"""A folder of .safetensors files, read in slices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from rayllm.checkpoint.files import check_file, read_json
from rayllm.errors import UsageError
from rayllm.models.config_fields import typed

if TYPE_CHECKING:
    from rayllm.models.layers import WeightSlice

WEIGHTS = "*.safetensors"
INDEX = "model.safetensors.index.json"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    """The file of each tensor."""


class SafetensorsCheckpoint:
    """The files are memory-mapped: a slice is copied straight to its target. Tensors have Hugging Face's names.

    Raises UsageError if a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in weight_files(folder):
            file = _open(path, "pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None when there is no such tensor."""
        file = self._files.get(name)
        return None if file is None else tuple(file.get_slice(name).get_shape())

    def read(self, part: WeightSlice) -> int:
        """Fills `part.target`, converted to its dtype; returns the bytes read."""
        tensor = self._files[part.name].get_slice(part.name)
        span = slice(part.start, part.start + part.target.shape[part.dim])
        values = tensor[span] if part.dim == 0 else tensor[:, span]
        part.target.copy_(values)
        return values.nbytes


def weight_files(folder: Path) -> list[Path]:
    """The files that the folder's index names, or else all there are. Raises UsageError for a damaged index."""
    index = folder / INDEX
    if not index.exists():
        return sorted(folder.glob(WEIGHTS))
    names = sorted(set(typed(read_json(index), _Index, str(index)).weight_map.values()))
    if wrong := next((name for name in names if Path(name).name != name), None):
        raise UsageError(f"{index}: weight_map: {wrong!r} is no file of this folder")
    return [folder / name for name in names]


def check_weights(files: list[Path]) -> None:
    """Raises UsageError if a file is missing or damaged, as far as its header tells; reads no weights."""
    for file in files:
        _open(file, "np")


def _open(file: Path, framework: Literal["pt", "np"]) -> Any:
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        raise UsageError(f"{file} is missing: download the checkpoint again")
    check_file(file)
    try:
        return safe_open(file, framework=framework)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} is damaged ({error}): download the checkpoint again") from None
