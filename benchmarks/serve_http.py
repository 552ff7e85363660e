"""Load on a service's streaming `/v1/completions`: requests of `seed256`, a fixed number of them always in flight.

    python benchmarks/serve_http.py --url http://127.0.0.1:8000 --concurrency 64 --requests 256
    python benchmarks/serve_http.py --model MODEL --concurrency 64 --requests 256 -- --max-num-seqs 64

The second starts `rayllm serve MODEL` with the flags after `--`, and stops it at the end. Prints one JSON line. Lengths
are those of `seed256`, over and over; token ids are new in every run: a server's prefix cache cannot know them.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import http.client
import itertools
import json
import multiprocessing
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, cast

import httptools
import msgspec
import numpy as np
import uvloop
from tqdm import tqdm
from workloads import make

LONGEST = 1024  # of seed256's prompts and outputs
NUM_WARMUP, WARMUP_TOKENS = 8, 16
REQUEST_TIMEOUT_S, STOP_TIMEOUT_S = 600.0, 90.0


class Event(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: dict[str, Any] | None = None
    error: Any = None


@dataclass
class Record:
    """What became of a request; times are of the clock that all processes share."""

    start: float
    first: float = 0.0
    last: float = 0.0
    end: float = 0.0
    num_chunks: int = 0
    num_tokens: int = 0
    error: str = ""
    message: str = ""


class Stream(asyncio.Protocol):
    """A connection, for one request at a time; an event costs less than half of the CPU time that aiohttp takes."""

    decode = msgspec.json.Decoder(Event).decode

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.parser = httptools.HttpResponseParser(self)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def post(self, request: bytes, num_tokens: int, record: Record) -> None:
        self.record, self.rest = record, b""
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self.done
        if (status := self.parser.get_status_code()) != 200:
            record.error, record.message = str(status), self.rest.decode(errors="replace")
        elif not record.error and record.num_tokens != num_tokens:
            record.error, record.message = "incomplete", f"{record.num_tokens} of {num_tokens} tokens"

    def data_received(self, data: bytes) -> None:
        self.now = time.monotonic()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.transport.abort()
            self.connection_lost(error)

    def on_body(self, body: bytes) -> None:
        record = self.record
        *events, self.rest = (self.rest + body).split(b"\n\n")
        for data in events:
            if not data.startswith(b"data: {"):
                continue
            event = self.decode(memoryview(data)[6:])
            if event.choices:
                record.num_chunks += 1
                record.first, record.last = record.first or self.now, self.now
            if event.usage:
                record.num_tokens = event.usage["completion_tokens"]
            if event.error:
                record.error, record.message = "stream", str(event.error)

    def on_message_complete(self) -> None:
        if not self.parser.should_keep_alive():
            self.transport.close()
        if not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(str(error or "the server closed the connection")))


def make_requests(options: argparse.Namespace) -> list[tuple[bytes, int]]:
    """As sent, with the number of tokens asked for: those to warm up with, then those that count."""
    workload, rng = make("seed256", seed=0), random.Random(options.seed)
    url = urllib.parse.urlsplit(options.url)
    head = f"POST {url.path}/v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
    if options.api_key:
        head += f"Authorization: Bearer {options.api_key}\r\n"
    fields = {"model": options.model, "temperature": 0.6, "ignore_eos": True}
    fields |= {"stream": True, "stream_options": {"include_usage": True}}

    def request(prompt_len: int, num_tokens: int) -> tuple[bytes, int]:
        prompt = [rng.randint(0, 10000) for _ in range(prompt_len)]
        body = msgspec.json.encode(fields | {"prompt": prompt, "max_tokens": num_tokens})
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, num_tokens

    prompt_lens = [max(1, len(prompt) * options.max_prompt_len // LONGEST) for prompt in workload.prompts]
    output_lens = [max(1, output_len * options.max_output_len // LONGEST) for output_len in workload.output_lens]
    lens = list(zip(prompt_lens, output_lens, strict=True))
    warmup = [request(prompt_len, min(output_len, WARMUP_TOKENS)) for prompt_len, output_len in lens[:NUM_WARMUP]]
    return warmup + [request(*pair) for pair in itertools.islice(itertools.cycle(lens), options.requests)]


def send(options: argparse.Namespace, share: int, shared: tuple[Any, ...], results: Connection) -> None:
    """A process: keeps `share` requests in flight until all processes together have sent all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    requests = make_requests(options)
    url = urllib.parse.urlsplit(options.url)
    num_warmed, num_sent, barrier = shared

    async def keep_busy(requests: list[tuple[bytes, int]], taken: Any, does_count: bool) -> None:
        stream: Any = None
        while True:
            with taken.get_lock():
                index, taken.value = taken.value, taken.value + 1
            if index >= len(requests):
                break
            record = Record(time.monotonic())
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    if stream is None or stream.transport.is_closing():
                        loop = asyncio.get_running_loop()
                        _, stream = await loop.create_connection(Stream, url.hostname, url.port or 80)
                    await stream.post(*requests[index], record)
            except OSError as error:
                record.error = "timeout" if isinstance(error, TimeoutError) else "connection"
                record.message = str(error)
                if stream:
                    stream.transport.close()
            record.end = time.monotonic()
            if does_count:
                results.send(record)
        if stream:
            stream.transport.close()

    async def work() -> None:
        await asyncio.gather(*(keep_busy(requests[:NUM_WARMUP], num_warmed, False) for _ in range(share)))
        barrier.wait()
        await asyncio.gather(*(keep_busy(requests[NUM_WARMUP:], num_sent, True) for _ in range(share)))

    uvloop.run(work())


def measure(options: argparse.Namespace) -> list[Record]:
    context = multiprocessing.get_context("spawn")
    num_processes = min(options.processes, options.concurrency)
    shared = context.Value("q", 0), context.Value("q", 0), context.Barrier(num_processes)
    processes: dict[Connection, Any] = {}
    records: list[Record] = []
    try:
        for i in range(num_processes):
            share = options.concurrency // num_processes + (i < options.concurrency % num_processes)
            receiver, sender = context.Pipe(duplex=False)
            processes[receiver] = context.Process(target=send, args=(options, share, shared, sender))
            processes[receiver].start()
            sender.close()  # so that the pipe ends with the process
        with tqdm(total=options.requests, unit="req") as bar:
            while processes:
                for receiver in cast(list[Connection], wait(list(processes))):
                    try:
                        records.append(receiver.recv())
                        bar.update()
                    except EOFError:
                        process = processes.pop(receiver)
                        process.join()
                        if process.exitcode:
                            fail(f"a client process ended with exit code {process.exitcode}", 1)
    finally:
        for process in processes.values():
            process.terminate()
    return records


def report(options: argparse.Namespace, records: list[Record]) -> dict[str, Any]:
    good = [record for record in records if not record.error]
    seconds = max(record.end for record in records) - min(record.start for record in records)
    output_tokens = sum(record.num_tokens for record in good)
    return {name: getattr(options, name) for name in ("url", "model", "concurrency", "requests")} | {
        "seconds": round(seconds, 3),
        "output_tokens": output_tokens,
        "output_tokens_per_s": round(output_tokens / seconds, 1),
        "ttft_ms": percentiles([record.first - record.start for record in good]),
        "tpot_ms": percentiles([(r.last - r.first) / (r.num_tokens - 1) for r in good if r.num_tokens > 1]),
        "e2e_ms": percentiles([record.end - record.start for record in good]),
        "chunks_per_s": round(sum(record.num_chunks for record in records) / seconds, 1),
        "errors": dict(collections.Counter(record.error for record in records if record.error)),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{q}": round(1000 * float(np.percentile(seconds, q)), 2) for q in (50, 90, 99)} if seconds else {}


@contextlib.contextmanager
def serving(options: argparse.Namespace, flags: list[str]) -> Iterator[float]:
    """A `rayllm serve` of our own; the seconds from its start until it was healthy."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", options.port)) == 0:
            fail(f"port {options.port} is taken")
    command = [sys.executable, "-m", "rayllm", "serve", options.model, "--port", str(options.port), *flags]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)  # Ctrl-C reaches it through us
    try:
        while not is_healthy(options.url):
            if process.poll() == 2:
                sys.exit(2)  # it has said why
            if process.returncode is not None:
                fail(f"the service ended with exit code {process.returncode}", 1)
            time.sleep(0.05)
        yield time.monotonic() - start
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except BaseException:  # too slow, or Ctrl-C once more
            process.kill()
            raise


def get(url: str, api_key: str | None = None) -> bytes:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as response:
        return cast(bytes, response.read())


def is_healthy(url: str) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return bool(get(f"{url}/health"))
    return False


def served_models(url: str, api_key: str | None) -> list[str]:
    try:
        return [model["id"] for model in json.loads(get(f"{url}/v1/models", api_key))["data"]]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        fail(f"{url}/v1/models does not list models: {error}")


def fail(message: str, code: int = 2) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # type: ignore[method-assign]
    parser.add_argument("--url", help="The URL of a running service. Without it, one is started here.")
    parser.add_argument("--model", help="The model's name at --url (the first served by default), or its path.")
    parser.add_argument("--port", type=int, default=8000, help="The port of the service that is started here.")
    parser.add_argument("--api-key", help="The key that the service asks for.")
    parser.add_argument("--concurrency", type=int, required=True, help="Requests in flight.")
    parser.add_argument("--requests", type=int, required=True, help="Requests in all.")
    parser.add_argument("--processes", type=int, default=8, help="Processes that send requests (8).")
    parser.add_argument(
        "--max-prompt-len",
        type=int,
        default=LONGEST,
        help="Prompts are scaled down to it from 1024.",
    )
    parser.add_argument(
        "--max-output-len",
        type=int,
        default=LONGEST,
        help="Outputs are scaled down to it from 1024.",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=random.getrandbits(32),
        help="The seed of the token ids.",
    )
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, flags = parser.parse_args(arguments[:end]), arguments[end + 1 :]
    for name in ("concurrency", "requests", "processes", "max_prompt_len", "max_output_len"):
        if getattr(options, name) < 1:
            fail(f"{name} must be at least 1, not {getattr(options, name)}")
    if not (options.url or options.model):
        fail("give --url of a running service, or --model to start one")
    if options.url and flags:
        fail("flags after -- are for a service that is started here, without --url")
    if options.url and not options.url.startswith("http://"):
        fail(f"url must be http://HOST:PORT, not {options.url}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a service started here must not stay behind
    started: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        wanted = options.model if options.url else None
        if not options.url:
            options.url = f"http://127.0.0.1:{options.port}"
            started["startup_s"] = round(stack.enter_context(serving(options, flags)), 1)
        options.url = options.url.rstrip("/")
        names = served_models(options.url, options.api_key)
        options.model = wanted or names[0]
        if options.model not in names:
            fail(f"model must be one of {', '.join(names)}, not {wanted}")
        records = measure(options)
    print(json.dumps(report(options, records) | started), flush=True)
    if failed := [record for record in records if record.error]:
        fail(f"{len(failed)} of {len(records)} requests, one with {failed[0].error}: {failed[0].message}", 1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
