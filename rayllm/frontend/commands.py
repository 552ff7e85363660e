"""`rayllm generate` and `rayllm chat`: an engine of one's own, used from a terminal."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Any

from rayllm.command_line import ADDRESS_HELP, MODEL_HELP, Command, add_flag
from rayllm.config import EngineArgs
from rayllm.errors import UsageError
from rayllm.options import add_arguments, from_arguments
from rayllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from rayllm.frontend.client import Prompt
    from rayllm.frontend.llm import LLM

SAMPLING_FLAGS: dict[str, tuple[type, Any, str]] = {
    "temperature": (float, 0.0, "How random the answer is; 0 is greedy."),
    "top_p": (float, 1.0, "Only the likeliest tokens that make up this probability are sampled."),
    "top_k": (int, 0, "Only so many of the likeliest tokens are sampled; 0 keeps all."),
    "min_p": (float, 0.0, "Only tokens at least this fraction as likely as the likeliest are sampled."),
    "repetition_penalty": (float, 1.0, "Over 1, what was said already is said less."),
    "max_tokens": (int, 256, "The longest answer, in tokens."),
}
"""Type, default and help of each."""


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    add_flag(parser, "prompt", help="The text to answer. Without it, that is the standard input.")
    add_flag(parser, "raw", action="store_true", help="The text is continued, without a chat template.")
    _add_shared(parser)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    add_flag(parser, "system", help="The system message.")
    _add_shared(parser)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    for name, (kind, default, doc) in SAMPLING_FLAGS.items():
        add_flag(sampling, name, type=kind, default=default, help=doc)
    add_flag(sampling, "request_seed", type=int, help="The seed that makes random sampling repeatable.")
    add_flag(
        sampling,
        "stop",
        action="append",
        metavar="TEXT",
        help="A text that ends the answer; may be given several times.",
    )
    engine = parser.add_argument_group("engine")
    add_flag(engine, "address", help=ADDRESS_HELP)
    add_arguments(engine, EngineArgs)


def _generate(options: argparse.Namespace) -> None:
    if not options.prompt and sys.stdin.isatty():
        raise UsageError("no prompt: pass --prompt TEXT, or pipe it in", "prompt")
    params = _params_of(options)
    with _start(options) as llm:
        text = options.prompt or sys.stdin.read()
        _answer(llm, text if options.raw else [{"role": "user", "content": text}], params)


def _chat(options: argparse.Namespace) -> None:
    params = _params_of(options)
    with _start(options) as llm:
        _converse(llm, [{"role": "system", "content": options.system}] if options.system else [], params)


def _params_of(options: argparse.Namespace) -> SamplingParams:
    given = {name: getattr(options, name) for name in SAMPLING_FLAGS}
    return SamplingParams(**given, seed=options.request_seed, stop=options.stop)


def _start(options: argparse.Namespace) -> LLM:
    engine = dataclasses.asdict(from_arguments(options, EngineArgs))
    if options.skip_tokenizer_init:
        raise UsageError("skip_tokenizer_init leaves no way to read or write text here", "skip_tokenizer_init")
    from rayllm.frontend.llm import LLM  # brings Ray along

    return LLM(**engine, address=options.address)


def _answer(llm: LLM, prompt: Prompt, params: SamplingParams) -> None:
    """Streams the answer, then says how long it took."""
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


def _converse(llm: LLM, messages: list[dict[str, Any]], params: SamplingParams) -> None:
    """Appends what is said to `messages`; a message that cannot be answered is taken back."""
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


def _read_line() -> str | None:
    """What the user types; None when the input has ended."""
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return None


GENERATE = Command(
    "generate", "Streams the answer to one prompt, then says how long it took.", _add_generate, _generate
)
CHAT = Command("chat", "A conversation: Ctrl-C stops an answer, Ctrl-D ends the chat.", _add_chat, _chat)
