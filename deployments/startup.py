"""The start of an application, as far as Serve does not watch over it.

Replicas leave what they have to tell in Ray's key-value store: one that starts cannot be called yet, and of one that
failed Serve tells a text. And Serve would wait for an engine's resources for ever.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from typing import Any

from rayllm.config import EngineConfig
from rayllm.engine import placement, ray_private
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


def placing(app: str, deployment: str, config: EngineConfig, num_engines: int) -> Iterator[Progress]:
    """Yields how long it has been waited, until so many engines of `deployment` have their resources.

    Raises `UsageError` after `placement_timeout_s`.
    """

    def are_placed() -> bool:
        return ray_private.count_serve_places(app, deployment) >= num_engines

    bundles = placement.bundles_of(config.tensor_parallel_size, config.device)
    needed, timeout_s = placement.needed_by(bundles, num_engines), config.placement_timeout_s
    for elapsed, free in placement.waiting(are_placed, bundles, num_engines, timeout_s, "num_replicas"):
        yield Progress(f"waiting for {needed}: {free}", int(elapsed), int(timeout_s))


def _write(app: str, what: str, value: object) -> None:
    ray_private.kv_put(NAMESPACE, f"{app}/{what}", pickle.dumps(value))


def _read(app: str, what: str) -> Any:
    found = ray_private.kv_get(NAMESPACE, f"{app}/{what}")
    return pickle.loads(found) if found else None
