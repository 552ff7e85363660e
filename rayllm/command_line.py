"""What the subcommands of `rayllm` share: parsing, exit codes, errors in one line."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from rayllm.errors import AllFailedError, EngineDeadError, UsageError, nearest
from rayllm.options import HelpFormatter

STARTED = time.monotonic()
"""When the command began: this module is among the first that are loaded."""
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
    """Says what is wrong in one line, and in its help the defaults that say something. Flags are not abbreviated."""

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Knows all of them: what it does not know is an error of this parser, which also a subcommand has."""
        given = sys.argv[1:] if args is None else list(args)
        self._check_flags(given)  # before a flag is missing, which may be the misspelt one
        known, others = super().parse_known_args(given, namespace)
        if others:
            self.error(f"unexpected argument {others[0]!r}")
        return known, others

    def _check_flags(self, given: list[str]) -> None:
        for argument in given:
            name = argument.partition("=")[0]
            if argument == "--" or (self._subparsers and not name.startswith("-")):
                return  # what follows are no flags, or those of a subcommand
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                near = nearest(name, self._option_string_actions)
                self.error(f"unknown flag {name}" + (f": did you mean {near}?" if near else ""))

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
