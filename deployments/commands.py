"""`rayllm serve` and `rayllm batch`: their arguments. What they do is imported when they run."""

from __future__ import annotations

import argparse

from deployments.config import ApiConfig, BatchConfig, ServedModel
from rayllm.command_line import MODEL_HELP, Command, add_flag
from rayllm.options import add_arguments, from_arguments


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    service = parser.add_argument_group("service")
    add_flag(service, "host", default="127.0.0.1", help="where to listen; 0.0.0.0 opens it to the network")
    add_flag(service, "port", type=int, default=8000, help="port to listen at")
    add_flag(service, "address", help="address of a running Ray cluster; default: start Ray here")
    add_arguments(service, ApiConfig)
    add_arguments(parser.add_argument_group("model"), ServedModel)


def _serve(options: argparse.Namespace) -> None:
    from deployments.serving import serve_until_stopped

    api, model = from_arguments(options, ApiConfig), from_arguments(options, ServedModel)
    serve_until_stopped(api, model, options.host, options.port, options.address)


def _add_batch(parser: argparse.ArgumentParser) -> None:
    add_flag(parser, "model", required=True, help=MODEL_HELP)
    add_flag(
        parser,
        "input",
        required=True,
        help="a .jsonl or .parquet file, a folder of such, or a quoted glob; see the README",
    )
    add_flag(parser, "output", required=True, help="folder of the answers")
    add_flag(parser, "address", help="address of a running Ray cluster; default: that of the job, or start Ray here")
    add_arguments(parser.add_argument_group("engines"), BatchConfig)


def _batch(options: argparse.Namespace) -> None:
    from deployments.batch_jobs.job import run

    run(from_arguments(options, BatchConfig), options.input, options.output, options.address)


SERVE = Command("serve", "Serves a model over HTTP, as OpenAI's API.", _add_serve, _serve)
BATCH = Command("batch", "Answers all rows of files; started again, those that have no answer yet.", _add_batch, _batch)
