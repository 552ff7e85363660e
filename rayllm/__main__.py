"""The command line: `rayllm generate`, `rayllm chat` and `rayllm serve`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from deployments.config import ApiConfig, ServedModel
from rayllm.config import EngineArgs
from rayllm.errors import EngineDeadError, UsageError
from rayllm.frontend.client import Prompt
from rayllm.frontend.llm import LLM
from rayllm.options import HelpFormatter, add_arguments, from_arguments
from rayllm.sampling_params import SamplingParams

SAMPLING_FLAGS: dict[str, tuple[type, Any, str]] = {
    "temperature": (float, 0.0, "0 is greedy"),
    "top_p": (float, 1.0, "keep the likeliest tokens that make up this probability"),
    "top_k": (int, 0, "keep so many of the likeliest tokens; 0: all"),
    "min_p": (float, 0.0, "keep tokens at least this fraction as likely as the likeliest"),
    "repetition_penalty": (float, 1.0, "over 1: less of what was said already"),
    "max_tokens": (int, 256, "longest answer, in tokens"),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {message} (`{self.prog} --help` lists what there is)\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    return exit_code(lambda: _run(options))


def exit_code(work: Callable[[], None]) -> int:
    """Does it: 0, 1 when the engine failed, 2 when what was asked cannot work; errors are told in one line."""
    try:
        work()
        return 0
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except EngineDeadError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> None:
    if options.command == serve:
        return serve(options)
    engine = dataclasses.asdict(from_arguments(options, EngineArgs))
    params = SamplingParams(
        **{name: getattr(options, name) for name in SAMPLING_FLAGS}, seed=options.request_seed, stop=options.stop
    )
    if options.command == generate and not options.prompt and sys.stdin.isatty():
        raise UsageError("no prompt: pass --prompt TEXT, or pipe it in")
    if options.skip_tokenizer_init:
        raise UsageError("skip_tokenizer_init leaves no way to read or write text here")
    with LLM(**engine, address=options.address) as llm:
        options.command(llm, options, params)


def generate(llm: LLM, options: argparse.Namespace, params: SamplingParams) -> None:
    """Streams the answer to one prompt, then says how long it took."""
    text = options.prompt or sys.stdin.read()
    prompt: Prompt = text if options.raw else [{"role": "user", "content": text}]
    start = time.monotonic()
    first, prompt_tokens, output_tokens = 0.0, 0, 0
    for increment in llm.stream(prompt, params):
        first = first or time.monotonic()
        prompt_tokens = increment.num_prompt_tokens
        output_tokens += len(increment.token_ids)
        print(increment.text, end="", flush=True)
    seconds = time.monotonic() - first
    rate = f", {(output_tokens - 1) / seconds:.1f} tokens/s" if output_tokens > 1 else ""
    print(
        f"\n\n{prompt_tokens} prompt tokens, {output_tokens} output tokens, "
        f"{1000 * (first - start):.0f} ms to the first token{rate}"
    )


def chat(llm: LLM, options: argparse.Namespace, params: SamplingParams) -> None:
    """A conversation: Ctrl-C stops an answer, Ctrl-D ends the chat."""
    messages = [{"role": "system", "content": options.system}] if options.system else []
    print("Ctrl-C stops an answer, Ctrl-D ends the chat.")
    while (text := _read_line()) is not None:
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        answer = ""
        try:
            for increment in llm.stream(messages, params):
                answer += increment.text
                print(increment.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except UsageError as error:  # the conversation is too long, say
            messages.pop()
            print(f"Error: {error}", end="")
        if answer:
            messages.append({"role": "assistant", "content": answer})
        print("\n")


def serve(options: argparse.Namespace) -> None:
    """Serves a model over HTTP, as OpenAI's API."""
    from deployments.command import run  # brings Ray Serve along

    run(options)


def _read_line() -> str | None:
    """None when the input has ended."""
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="rayllm", description="Large language models on Ray.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for function in (generate, chat, serve):
        summary = (function.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(function.__name__, help=summary, description=summary, formatter_class=HelpFormatter)
        sub.set_defaults(command=function)
        sub.add_argument("model", help="a model folder, a .gguf file, a Hub id or a URL")
        if function is serve:
            service = sub.add_argument_group("service")
            _flag(service, "host", default="127.0.0.1", help="where to listen; 0.0.0.0 opens it to the network")
            _flag(service, "port", type=int, default=8000, help="where to listen")
            _flag(service, "address", help="of a running Ray cluster; default: start Ray here")
            add_arguments(service, ApiConfig)
            add_arguments(sub.add_argument_group("model"), ServedModel)
            continue
        if function is generate:
            sub.add_argument("--prompt", help="what to answer; default: the standard input")
            sub.add_argument("--raw", action="store_true", help="continue the text; no chat template")
        else:
            sub.add_argument("--system", help="the system message")
        sampling = sub.add_argument_group("sampling")
        for name, (kind, default, doc) in SAMPLING_FLAGS.items():
            _flag(sampling, name, type=kind, default=default, help=doc)
        _flag(sampling, "request_seed", type=int, help="makes random sampling repeatable")
        _flag(sampling, "stop", action="append", metavar="TEXT", help="ends the answer; may be given several times")
        engine = sub.add_argument_group("engine")
        _flag(engine, "address", help="of a running Ray cluster; default: start Ray here")
        add_arguments(engine, EngineArgs)
    return parser


def _flag(group: Any, name: str, **settings: Any) -> None:
    group.add_argument("--" + name.replace("_", "-"), **settings)


if __name__ == "__main__":
    sys.exit(main())
