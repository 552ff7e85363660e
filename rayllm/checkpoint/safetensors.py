"""A folder of .safetensors files, read in slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayllm.errors import UsageError
from rayllm.models.layers import WeightSlice


class SafetensorsCheckpoint:
    """The files are memory-mapped: a slice is copied straight to its target. Tensors have Hugging Face's names.

    Raises UsageError if a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(file.name for file in folder.glob("*.safetensors"))
        self._files: dict[str, Any] = {}
        for name in names:
            file = _open_safetensors(folder / name)
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


def _open_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UsageError(f"{file} is missing: download the checkpoint again") from None
    except SafetensorError as error:
        raise UsageError(f"{file} is damaged ({error}): download the checkpoint again") from error
