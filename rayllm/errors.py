"""The errors that rayllm raises for its users; each message is one line that says what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class UsageError(ValueError):
    """The input (argument, model, prompt, cluster) cannot be served; raised before anything expensive starts.

    `param` names the argument or the request's field that is wrong, if it is one.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(" ".join(message.splitlines()))  # it may quote what came from outside
        self.param = param


class ContextLengthError(UsageError):
    """The prompt does not fit into the model's context."""


class EngineDeadError(RuntimeError):
    """The driver or a shard died, or failed; the message names the cause."""


class AllFailedError(RuntimeError):
    """A batch job went to its end, and not one of its rows was answered."""


class QueueFullError(RuntimeError):
    """So much waits for the engine already that it takes no more; to be tried again later."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` may be a misspelling of."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def check_names(names: Iterable[str], known: Collection[str], what: str) -> None:
    """Raises `UsageError` for the first of `names` that is not `known`; `what` it names is told."""
    for name in names:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else f"known are {', '.join(sorted(known))}"
            raise UsageError(f"unknown {what} {name}: {hint}", name)
