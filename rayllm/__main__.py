"""The command line: `rayllm generate`, `rayllm chat`, `rayllm serve` and `rayllm batch`."""

from __future__ import annotations

import sys

from deployments.batch_jobs.command import BATCH
from deployments.command import SERVE
from rayllm import __version__
from rayllm.command_line import Parser, exit_code
from rayllm.frontend.commands import CHAT, GENERATE


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code, see `exit_code`."""
    options = _parser().parse_args(arguments)
    return exit_code(lambda: options.run(options))


def _parser() -> Parser:
    parser = Parser(prog="rayllm", description="Large language models on Ray.")
    parser.add_argument("--version", action="version", version=f"rayllm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for command in (GENERATE, CHAT, SERVE, BATCH):
        own = commands.add_parser(command.name, help=command.summary, description=command.summary)
        own.set_defaults(run=command.run)
        command.add_arguments(own)
    return parser


if __name__ == "__main__":
    sys.exit(main())
