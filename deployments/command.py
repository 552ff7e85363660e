"""`rayllm serve`: its arguments. What it does is imported when it runs."""

from __future__ import annotations

import argparse

from deployments.config import ApiConfig, ServedModel
from rayllm.command_line import ADDRESS_HELP, MODEL_HELP, Command, add_flag
from rayllm.options import add_arguments, from_arguments


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    service = parser.add_argument_group("service")
    add_flag(service, "host", default="127.0.0.1", help="The address to listen at; 0.0.0.0 opens it to the network.")
    add_flag(service, "port", type=int, default=8000, help="The port to listen at.")
    add_flag(service, "address", help=ADDRESS_HELP)
    add_arguments(service, ApiConfig)
    add_arguments(parser.add_argument_group("model"), ServedModel)


def _serve(options: argparse.Namespace) -> None:
    from deployments.serving import serve_until_stopped

    api, model = from_arguments(options, ApiConfig), from_arguments(options, ServedModel)
    serve_until_stopped(api, model, options.host, options.port, options.address)


SERVE = Command("serve", "Serves a model over HTTP, as OpenAI's API.", _add_serve, _serve)
