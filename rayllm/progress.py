"""How long work tells how far it is: the shards keep it, whoever waits for them asks and shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """`done` of `total` pieces of `stage`."""

    stage: str
    done: int = 0
    total: int = 0


class Track(Protocol):
    """Yields the items, and takes note of how many are done."""

    def __call__(self, items: Sequence[T], stage: str, /) -> Iterable[T]: ...


def untracked(items: Sequence[T], stage: str) -> Sequence[T]:
    """The `Track` that takes no note."""
    return items


class Tracker:
    """`track` is a `Track`; `progress` is where it is, or the stage that was set last."""

    def __init__(self) -> None:
        self.progress = Progress("starting")

    def stage(self, name: str) -> None:
        self.progress = Progress(name)

    def track(self, items: Sequence[T], stage: str) -> Iterator[T]:
        for done, item in enumerate(items):
            self.progress = Progress(stage, done, len(items))
            yield item
