"""Files of a model folder, and what is said of those that are not what their names tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayllm.errors import UsageError

LFS_POINTER = b"version https://git-lfs"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError that names the file if there is none."""
    check_file(file)
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold a JSON object")
    return content


def check_file(file: Path) -> None:
    """Raises UsageError for a file that cannot be read, and for one that only points to its content."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    if start == LFS_POINTER:
        raise UsageError(f"{file} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
