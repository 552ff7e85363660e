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
from rayllm.frontend.sampling_flags import add_sampling_arguments, sampling_params
from rayllm.options import add_arguments, from_arguments
from rayllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from rayllm.frontend.client import Prompt
    from rayllm.frontend.llm import LLM
    from rayllm.frontend.output import Increment
    from rayllm.messages.step import Logprobs

SYSTEM_HELP = "The system message."


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    add_flag(parser, "prompt", help="The text to answer. Without it, that is the standard input.")
    kind = parser.add_mutually_exclusive_group()
    add_flag(kind, "system", help=SYSTEM_HELP)
    add_flag(kind, "raw", action="store_true", help="The text is continued, without a chat template.")
    _add_shared(parser)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    add_flag(parser, "system", help=SYSTEM_HELP)
    _add_shared(parser)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add_sampling_arguments(parser.add_argument_group("sampling"))
    engine = parser.add_argument_group("engine")
    add_flag(engine, "address", help=ADDRESS_HELP)
    add_arguments(engine, EngineArgs)


def _generate(options: argparse.Namespace) -> None:
    if not options.prompt and sys.stdin.isatty():
        raise UsageError("no prompt: pass --prompt TEXT, or pipe it in", "prompt")
    params = sampling_params(options)
    text = options.prompt or _read_input()
    with _start(options) as llm:
        _answer(llm, text if options.raw else [*_system(options), {"role": "user", "content": text}], params)


def _read_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"the input is not {error.encoding}: {error.reason}", "prompt") from None


def _chat(options: argparse.Namespace) -> None:
    params = sampling_params(options)
    if params.n > 1:
        raise UsageError(f"n must be 1 in a chat, which goes on from one answer, not {params.n}", "n")
    with _start(options) as llm:
        _converse(llm, _system(options), params)


def _system(options: argparse.Namespace) -> list[dict[str, Any]]:
    return [{"role": "system", "content": options.system}] if options.system else []


def _start(options: argparse.Namespace) -> LLM:
    engine = dataclasses.asdict(from_arguments(options, EngineArgs))
    if options.skip_tokenizer_init:
        raise UsageError("skip_tokenizer_init leaves no way to read or write text here", "skip_tokenizer_init")
    from rayllm.frontend.llm import LLM  # brings Ray along

    return LLM(**engine, address=options.address)


def _answer(llm: LLM, prompt: Prompt, params: SamplingParams) -> None:
    """Shows the answer, then says how long it took."""
    start = time.monotonic()
    choices: dict[int, Increment] = {}
    first = _say(llm, prompt, params, choices)
    seconds = time.monotonic() - first
    output_tokens = sum(len(choice.token_ids) for choice in choices.values())
    rate = f", {(output_tokens - params.n) / seconds:.1f} tokens/s" if output_tokens > params.n else ""
    print(
        f"\n\n{choices[0].num_prompt_tokens} prompt tokens, {output_tokens} output tokens, "
        f"{1000 * (first - start):.0f} ms to the first token{rate}"
    )


def _say(llm: LLM, prompt: Prompt, params: SamplingParams, choices: dict[int, Increment]) -> float:
    """Shows the first choice as it comes, the others and log-probabilities after it; returns when it began.

    `choices` gets what has come so far, by number.
    """
    first = 0.0
    for increment in llm.stream(prompt, params):
        first = first or time.monotonic()
        if increment.index == 0:
            print(increment.text, end="", flush=True)
        if increment.index in choices:
            choices[increment.index].extend(increment)
        else:
            choices[increment.index] = increment
    for index, choice in sorted(choices.items()):
        if index:
            print(f"\n\n[choice {index + 1}]\n{choice.text}", end="")
        else:
            _show_logprobs(llm, "prompt tokens but the first", choice.prompt_logprobs)
        _show_logprobs(llm, "output tokens", choice.logprobs)
    return first


def _show_logprobs(llm: LLM, what: str, entries: list[Logprobs]) -> None:
    """A line for each token: itself, then the likeliest others."""
    tokenizer = llm.async_llm.tokenizer
    assert tokenizer is not None
    if entries:
        print(f"\n\n[log-probabilities of the {what}, each before the likeliest others]", end="")
    for entry in entries:
        known = dict(zip(entry.token_ids, entry.logprobs, strict=True))
        print("\n" + "  ".join(f"{value:9.4f} {tokenizer.token_text(id)!r}" for id, value in known.items()), end="")


def _converse(llm: LLM, system: list[dict[str, Any]], params: SamplingParams) -> None:
    """Questions and answers until the input ends; a question that gets no answer is taken back."""
    print("/clear begins anew, Ctrl-C stops an answer, Ctrl-D ends the chat.")
    messages = list(system)
    while (text := _read_line()) is not None:
        if text.strip() == "/clear":
            messages = list(system)
        if text.strip() in ("", "/clear"):
            continue
        messages.append({"role": "user", "content": text})
        choices: dict[int, Increment] = {}
        note = ""
        try:
            _say(llm, messages, params, choices)
            note = _cut(llm, choices[0], params)
        except KeyboardInterrupt:
            if choices and choices[0].text:
                note = " [stopped]"
            else:
                note = "[stopped: the question is taken back]"
                choices = {}
        except UsageError as error:  # the conversation is too long, say
            note = f"Error: {error}" + (" (/clear begins anew)" if len(messages) > len(system) + 1 else "")
        if choices:
            messages.append({"role": "assistant", "content": choices[0].text})
        else:
            messages.pop()
        print(note + "\n")


def _cut(llm: LLM, answer: Increment, params: SamplingParams) -> str:
    """What kept the answer from its end, if anything did."""
    if answer.finish_reason != "length":
        return ""
    max_model_len = llm.async_llm.config.max_model_len
    if answer.num_prompt_tokens + len(answer.token_ids) >= max_model_len:
        return f" [the context of {max_model_len} tokens is full: /clear begins anew]"
    return f" [cut off by --max-tokens {params.max_tokens}]"


def _read_line() -> str | None:
    """What the user types; None when the input has ended."""
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            print()
        except UnicodeDecodeError as error:
            print(f"Error: this is not {error.encoding}")
        except EOFError:
            print()
            return None


GENERATE = Command(
    "generate", "Streams the answer to one prompt, then says how long it took.", _add_generate, _generate
)
CHAT = Command(
    "chat", "A conversation: /clear begins anew, Ctrl-C stops an answer, Ctrl-D ends the chat.", _add_chat, _chat
)
