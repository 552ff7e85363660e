"""What the subcommands of `rayllm` share: parsing, exit codes, errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from rayllm.errors import AllFailedError, EngineDeadError, UsageError
from rayllm.options import HelpFormatter

ADDRESS_HELP = (
    "The address of a running Ray cluster. Without it, RAY_ADDRESS holds, which a job has, or Ray starts here."
)
MODEL_HELP = "A model folder, a .gguf file, a Hub id or a URL."


@dataclass(frozen=True)
class Command:
    """A subcommand. Its modules are imported when it runs, not when it is listed."""

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    """Raises `UsageError` for what cannot work, and `EngineDeadError`."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and in its help the defaults that say something."""

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=HelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        self.exit(2, f"Error: {message} (`{self.prog} --help` lists what there is)\n")


def add_flag(group: argparse._ActionsContainer, name: str, **settings: Any) -> None:
    """A flag of the name with hyphens; `settings` are those of argparse."""
    group.add_argument("--" + name.replace("_", "-"), **settings)


def exit_code(work: Callable[[], None]) -> int:
    """Does it: 0, 1 when the engine failed, 2 when what was asked cannot work, 3 when all of it failed; errors are told
    in one line."""
    try:
        work()
        return 0
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except EngineDeadError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except AllFailedError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
