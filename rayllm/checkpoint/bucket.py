"""Models in a bucket, or wherever else pyarrow reads (`s3://`, `gs://`, `file://` …): copied once to each node."""

from __future__ import annotations

import fcntl
import fnmatch
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from rayllm.caches import writable_cache
from rayllm.checkpoint.gguf_metadata import part_names
from rayllm.errors import UsageError
from rayllm.progress import Track

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

PIECE_BYTES = 32 << 20
NUM_READERS = 8


def fetch(url: str, patterns: Sequence[str], track: Track) -> Path:
    """This node's copy of the file at `url`, or of those files in the folder there that fit `patterns`: what is new or
    changed is fetched, by one process while others wait. Files are whole or not there. With the first part of a split
    .gguf file come the others.

    Raises UsageError when there is nothing, or it cannot be read.
    """
    try:
        from pyarrow.fs import FileSelector, FileSystem, FileType
    except ImportError:
        raise UsageError(f"to read {url}, pyarrow is needed: pip install 'rayllm[bucket]'", "model") from None
    folder = folder_of(url)
    try:
        system, path = FileSystem.from_uri(url)
        found = system.get_file_info(path)
        if found.type == FileType.NotFound:
            raise UsageError(f"there is nothing at {url}", "model")
        is_folder = found.type == FileType.Directory
        if is_folder:
            files = system.get_file_info(FileSelector(path))
            names = [info.base_name for info in files if any(fnmatch.fnmatch(info.base_name, p) for p in patterns)]
        else:
            names = part_names(found.base_name)
            files = system.get_file_info([f"{path.removesuffix(found.base_name)}{name}" for name in names])
        wanted = [info for info in files if info.is_file and info.base_name in names]
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _copy(system, [info for info in wanted if not _is_there(info, folder)], folder, track)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"{url} cannot be read: {' '.join(str(error).split())}", "model") from None
    return folder if is_folder else folder / found.base_name


def folder_of(url: str) -> Path:
    """Where this node's copy is; made if need be."""
    name = f"{url.rstrip('/').rpartition('/')[2]}-{xxhash.xxh3_64_hexdigest(url.encode())}"
    return writable_cache(f"models/{name}")


def _is_there(info: FileInfo, folder: Path) -> bool:
    file = folder / info.base_name
    return file.is_file() and (file.stat().st_size, file.stat().st_mtime_ns) == (info.size, _time_of(info))


def _time_of(info: FileInfo) -> int:
    return info.mtime_ns or 0


def _copy(system: FileSystem, files: list[FileInfo], folder: Path, track: Track) -> None:
    parts = [folder / f".{info.base_name}.part" for info in files]
    streams: list[Any] = [system.open_input_file(info.path) for info in files]
    descriptors = [os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for part in parts]

    def copy(index: int, offset: int) -> None:
        data = streams[index].read_at(min(PIECE_BYTES, files[index].size - offset), offset)
        os.pwrite(descriptors[index], data, offset)

    readers = ThreadPoolExecutor(NUM_READERS)
    try:
        pieces = [(i, offset) for i, info in enumerate(files) for offset in range(0, info.size, PIECE_BYTES)]
        for done in track([readers.submit(copy, *piece) for piece in pieces], "fetching the model"):
            done.result()
        for info, part in zip(files, parts, strict=True):
            os.utime(part, ns=(_time_of(info), _time_of(info)))
            part.rename(folder / info.base_name)
    finally:
        readers.shutdown(cancel_futures=True)
        for descriptor in descriptors:
            os.close(descriptor)
        for part in parts:
            part.unlink(missing_ok=True)
