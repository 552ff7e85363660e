"""What replicas leave in Ray's key-value store while they start.

A replica that starts cannot be called yet, and of one that failed Serve tells a text.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from typing import Any

from rayllm.engine import ray_private
from rayllm.errors import EngineDeadError, UsageError
from rayllm.progress import Progress

NAMESPACE = b"rayllm"
PROGRESS, FAILURE = "progress", "failure"


def write_progress(app: str, progress: Progress) -> None:
    """Tells whoever waits for the application `app` how far its engine is."""
    _write(app, PROGRESS, progress)


def read_progress(app: str) -> Progress | None:
    """How far the application's engine is; None while nothing was told."""
    progress: Progress | None = _read(app, PROGRESS)
    return progress


@contextlib.contextmanager
def failure_told(app: str) -> Iterator[None]:
    """Tells whoever waits for the application `app` which error of ours ended this replica's start."""
    try:
        yield
    except (UsageError, EngineDeadError) as error:
        _write(app, FAILURE, error)
        raise


def read_failure(app: str) -> UsageError | EngineDeadError | None:
    """The error that ended a replica's start; None if none was told."""
    error: UsageError | EngineDeadError | None = _read(app, FAILURE)
    return error


def forget(app: str) -> None:
    """Removes what an earlier application of this name left."""
    for what in (PROGRESS, FAILURE):
        _write(app, what, None)


def _write(app: str, what: str, value: object) -> None:
    ray_private.kv_put(NAMESPACE, f"{app}/{what}", pickle.dumps(value))


def _read(app: str, what: str) -> Any:
    found = ray_private.kv_get(NAMESPACE, f"{app}/{what}")
    return pickle.loads(found) if found else None
