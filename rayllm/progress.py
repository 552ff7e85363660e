"""How long work tells how far it is: the shards keep it, whoever waits for them asks and shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tqdm import tqdm

T = TypeVar("T")

STAGE, PIECES = "{desc} [{elapsed}]", "{desc} {bar} {n_fmt}/{total_fmt} [{elapsed}]"


@dataclass(frozen=True)
class Progress:
    """How far work is: `done` of `total` pieces of `stage`; a stage without pieces has a total of 0."""

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
        """Begins a stage that has no pieces."""
        self.progress = Progress(name)

    def track(self, items: Sequence[T], stage: str) -> Iterator[T]:
        """Yields the items, each a piece of `stage`."""
        for done, item in enumerate(items):
            self.progress = Progress(stage, done, len(items))
            yield item
        self.progress = Progress(stage, len(items), len(items))


class ProgressBar:
    """Shows on stderr, in one line that vanishes at the end, how far work elsewhere is; a pipe or log gets nothing."""

    def __enter__(self) -> Callable[[Progress], None]:
        self._bar = tqdm(desc="starting", leave=False, disable=None, bar_format=STAGE)
        return self._show

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def _show(self, progress: Progress) -> None:
        self._bar.total, self._bar.n = progress.total, progress.done
        self._bar.bar_format = PIECES if progress.total else STAGE
        self._bar.set_description_str(progress.stage)
