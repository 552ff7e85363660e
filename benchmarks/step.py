"""Where a step's time goes: on the device, in the shard's Python, in the driver; one JSON line for each kind of step.

    python benchmarks/step.py --model config.json --load-format dummy

Decoding at batch 1 and at `--batch`, then mixed steps: `--decodes` sequences decode while prompts are computed in
chunks of `--chunk` tokens. Every engine argument is a flag, as for `rayllm generate`. Times are means over many steps,
in milliseconds; what the device idles is the rest of the wall clock, up to the launch itself.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
from typing import Any

from rayllm import AsyncLLM, SamplingParams
from rayllm.config import EngineArgs
from rayllm.engine.driver import EngineStats
from rayllm.options import add_arguments, from_arguments

PROMPT_LEN = 256


async def measure(llm: AsyncLLM, kind: str, num_decodes: int, num_tokens: int, prompts: list[list[int]]) -> None:
    """Steps from when `num_decodes` sequences decode until one of them has `num_tokens` tokens or, if there are such,
    until `prompts` are computed, one after the other. The sequences go on decoding all the while."""
    rng = random.Random()
    decoding, enough = asyncio.Barrier(num_decodes + 1), asyncio.Event()

    async def decode() -> None:
        prompt, num_got = [rng.randrange(10000) for _ in range(PROMPT_LEN)], -1
        async for increment in llm.generate(prompt, SamplingParams(ignore_eos=True, max_tokens=2 * num_tokens + 512)):
            if num_got < 0:
                await decoding.wait()
                num_got = 0
                continue
            num_got += len(increment.token_ids)
            if num_got >= num_tokens:
                enough.set()

    async def compute_prompts() -> None:
        for prompt in prompts:
            async for _ in llm.generate(prompt, SamplingParams(ignore_eos=True, max_tokens=1)):
                pass

    async def measured() -> tuple[EngineStats, EngineStats]:
        await decoding.wait()
        before = await llm.engine.check()
        await (compute_prompts() if prompts else enough.wait())
        return before, await llm.engine.check()

    decodes = [asyncio.create_task(decode()) for _ in range(num_decodes)]
    stats = asyncio.create_task(measured())
    await asyncio.wait([stats, *decodes], return_when=asyncio.FIRST_COMPLETED)
    for task in decodes:
        if task.done():
            task.result()  # what went wrong
            raise SystemExit("Error: a sequence ended before the steps were measured: tokens must be larger")
        task.cancel()
    await asyncio.gather(*decodes, return_exceptions=True)
    print(json.dumps(line(kind, *await stats)), flush=True)


def line(kind: str, before: EngineStats, after: EngineStats) -> dict[str, Any]:
    steps, wall_s = after.num_steps - before.num_steps, after.time_s - before.time_s
    seconds = {
        "wall": wall_s,
        "device": after.times.device_s - before.times.device_s,
        "launch": after.times.launch_s - before.times.launch_s,
        "driver": after.driver_s - before.driver_s,
    }
    per_step = {f"{name}_ms": round(1000 * value / steps, 3) for name, value in seconds.items()}
    return {"step": kind, "steps": steps, **per_step, "device_idle": round(1 - seconds["device"] / wall_s, 3)}


async def run(options: argparse.Namespace) -> None:
    arguments = dataclasses.asdict(from_arguments(options, EngineArgs)) | {"skip_tokenizer_init": True}
    mixed = {"max_num_seqs": options.decodes + 1, "max_num_batched_tokens": options.decodes + options.chunk}
    rng = random.Random(0)
    prompt_len = options.chunk * options.chunks_per_prompt
    prompts = [[rng.randrange(10000) for _ in range(prompt_len)] for _ in range(options.prompts)]
    async with AsyncLLM(**arguments | {"max_num_seqs": options.batch}) as llm:
        for batch in (1, options.batch):
            for _ in range(2):  # the first warms up
                await measure(llm, f"{batch} decode", batch, options.tokens, [])
    async with AsyncLLM(**arguments | mixed) as llm:
        kind = f"{options.decodes} decode, {options.chunk} of a prompt"
        await measure(llm, kind, options.decodes, 10 * options.tokens, prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A model, or with --load-format dummy a config.json.")
    parser.add_argument("--batch", type=int, default=256, help="Sequences that decode together.")
    parser.add_argument("--tokens", type=int, default=256, help="Output tokens of each sequence.")
    parser.add_argument("--decodes", type=int, default=200, help="Sequences that decode in mixed steps.")
    parser.add_argument("--chunk", type=int, default=2048, help="Prompt tokens in a mixed step.")
    parser.add_argument("--chunks-per-prompt", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16, help="Prompts in mixed steps, one after the other.")
    add_arguments(parser.add_argument_group("engine"), EngineArgs)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
