"""Where caches are on this node: in a folder of the user's, or else in another that can be written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from getpass import getuser
from pathlib import Path

from rayllm.errors import UsageError

TRITON, FLASH_ATTENTION = "TRITON_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
"""The variables that tell these libraries where to keep the kernels that they compile."""


def cache_roots() -> Iterator[Path]:
    """The folders that may hold our caches, the best first; the last is in the temporary folder."""
    with contextlib.suppress(RuntimeError):  # a user whom the system does not know, without HOME
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayllm"
    with contextlib.suppress(OSError):  # there may be no temporary folder
        # not named like what processes leave behind, which is removed
        temporary = Path(tempfile.gettempdir(), f"cache-rayllm-{os.getuid()}")
        if not os.path.lexists(temporary) or temporary.lstat().st_uid == os.getuid():  # others may write beside it
            yield temporary


def writable_cache(name: str) -> Path:
    """The folder `name` in the first of `cache_roots` where this user can write, made if need be.

    Raises UsageError if there is none.
    """
    roots = list(cache_roots())
    for root in roots:
        if is_writable(root / name):
            return root / name
    tried = " or ".join(map(str, roots)) or "any folder"
    raise UsageError(f"no cache can be written in {tried}: set XDG_CACHE_HOME, or TMPDIR, to a folder where it can")


def is_writable(folder: Path) -> bool:
    """Whether this user can write to `folder`, which may begin with ~ and is made if need be."""
    with contextlib.suppress(OSError, RuntimeError):
        found = folder.expanduser()
        found.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=found):  # permissions tell too little: of root, on a network's file system
            return True
    return False


def flash_attention_cache() -> Path:
    """Where FlashAttention-4 keeps what it compiles, made if need be. Raises UsageError if that can be nowhere."""
    with contextlib.suppress(KeyError, OSError):  # of a user without a name, or no temporary folder
        own = os.environ.get(FLASH_ATTENTION)
        folder = Path(own or Path(tempfile.gettempdir(), getuser(), "flash_attention_cute_dsl_cache"))
        if is_writable(folder):
            return folder
    return writable_cache("flash_attention")


def use_writable_caches() -> None:
    """Tells the libraries that compile kernels of a cache that they can write, before they are imported."""
    own = os.environ.get(TRITON) or Path(os.environ.get("TRITON_HOME") or "~", ".triton", "cache")
    if not is_writable(Path(own)):
        os.environ[TRITON] = str(writable_cache("triton"))
    os.environ[FLASH_ATTENTION] = str(flash_attention_cache())
