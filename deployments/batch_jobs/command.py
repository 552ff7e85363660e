"""`rayllm batch`: its arguments. What it does is imported when it runs."""

from __future__ import annotations

import argparse

from deployments.config import BatchConfig
from rayllm.command_line import ADDRESS_HELP, MODEL_HELP, Command, add_flag
from rayllm.options import add_arguments, from_arguments


def _add_batch(parser: argparse.ArgumentParser) -> None:
    add_flag(parser, "model", required=True, help=MODEL_HELP)
    add_flag(
        parser,
        "input",
        required=True,
        help="A .jsonl or .parquet file, a folder of such, or a quoted glob; the README says what is in them.",
    )
    add_flag(parser, "output", required=True, help="The folder of the answers.")
    add_flag(parser, "address", help=ADDRESS_HELP)
    add_arguments(parser.add_argument_group("engines"), BatchConfig)


def _batch(options: argparse.Namespace) -> None:
    from deployments.batch_jobs.job import run

    run(from_arguments(options, BatchConfig), options.input, options.output, options.address)


BATCH = Command("batch", "Answers all rows of files; started again, those that have no answer yet.", _add_batch, _batch)
