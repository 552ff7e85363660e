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
import statistics
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
import uvloop
from tqdm import tqdm
from workloads import make

LONGEST = 1024
"""Of seed256's prompts and outputs."""
NUM_WARMUP, WARMUP_TOKENS = 8, 16
STOP_S = 90.0

Request = tuple[bytes, int]
"""What is sent, and the number of tokens that it asks for."""


class Choice(msgspec.Struct):
    """What is in it is skipped."""


class Usage(msgspec.Struct):
    completion_tokens: int


class Event(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


@dataclass
class Record:
    """What became of one request; times are of the clock that all processes share."""

    start: float
    first: float = 0.0
    last: float = 0.0
    end: float = 0.0
    num_chunks: int = 0
    num_tokens: int = 0
    error: str = ""
    message: str = ""


class Stream(asyncio.Protocol):
    """A connection, for one request at a time; takes less than half of aiohttp's CPU time for an event."""

    decode = msgspec.json.Decoder(Event).decode
    record: Record

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.parser = httptools.HttpResponseParser(self)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def post(self, request: Request, record: Record) -> None:
        self.record, self.rest, self.is_whole = record, b"", False
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(request[0])
        await self.done
        if (status := self.parser.get_status_code()) != 200:
            record.error, record.message = str(status), self.rest.decode(errors="replace")
        elif not record.error and not (self.is_whole and record.num_tokens == request[1]):
            record.error, record.message = "incomplete", f"{record.num_tokens} of {request[1]} tokens"

    def data_received(self, data: bytes) -> None:
        self.now = time.monotonic()
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.rest += body
        if self.parser.get_status_code() != 200:
            return
        *events, self.rest = self.rest.split(b"\n\n")
        for event in events:
            if event == b"data: [DONE]":
                self.is_whole = True
            elif event.startswith(b"data: "):
                self.count(self.decode(memoryview(event)[6:]))

    def count(self, event: Event) -> None:
        record = self.record
        if event.choices:
            record.num_chunks += 1
            record.first, record.last = record.first or self.now, self.now
        if event.usage:
            record.num_tokens = event.usage.completion_tokens
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


# ---- the processes that send


def make_requests(options: argparse.Namespace) -> list[Request]:
    """Those to warm up with, then those that count."""
    workload, rng = make("seed256", seed=0), random.Random(options.seed)
    url = urllib.parse.urlsplit(options.url)
    key = f"Authorization: Bearer {options.api_key}\r\n" if options.api_key else ""
    head = f"POST {url.path}/v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\n{key}Content-Type: application/json\r\n"
    fields = {"model": options.model, "temperature": 0.6, "ignore_eos": True, "stream": True}

    def request(prompt_len: int, num_tokens: int) -> Request:
        prompt = [rng.randint(0, 10000) for _ in range(max(1, prompt_len * options.max_prompt_len // LONGEST))]
        own = {"prompt": prompt, "max_tokens": num_tokens, "stream_options": {"include_usage": True}}
        body = msgspec.json.encode(fields | own)
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, num_tokens

    lens = [
        (len(prompt), max(1, output_len * options.max_output_len // LONGEST))
        for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True)
    ]
    warmup = [request(prompt_len, min(output_len, WARMUP_TOKENS)) for prompt_len, output_len in lens[:NUM_WARMUP]]
    return warmup + [request(*pair) for pair in itertools.islice(itertools.cycle(lens), options.requests)]


def send(options: argparse.Namespace, share: int, shared: tuple[Any, Any, Any], results: Connection) -> None:
    """A process's work: `share` requests in flight until all processes have sent all. Sends a `Record` for each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    warmed, sent, barrier = shared
    requests = make_requests(options)

    async def work() -> None:
        await asyncio.gather(*(_keep_busy(options, requests[:NUM_WARMUP], warmed, None) for _ in range(share)))
        barrier.wait()
        await asyncio.gather(*(_keep_busy(options, requests[NUM_WARMUP:], sent, results) for _ in range(share)))

    uvloop.run(work())


async def _keep_busy(options: argparse.Namespace, requests: list[Request], taken: Any, results: Any) -> None:
    """Sends one request after another, of those that no process has `taken` yet."""
    url = urllib.parse.urlsplit(options.url)
    is_tls = url.scheme == "https"
    address = url.hostname, url.port or (443 if is_tls else 80)
    stream: Stream | None = None
    while True:
        with taken.get_lock():
            index = taken.value
            taken.value += 1
        if index >= len(requests):
            break
        record = Record(start=time.monotonic())
        try:
            async with asyncio.timeout(options.timeout):
                if stream is None or stream.transport.is_closing():
                    loop = asyncio.get_running_loop()
                    _, stream = await loop.create_connection(Stream, *address, ssl=is_tls or None)
                await stream.post(requests[index], record)
        except OSError as error:  # TimeoutError is one
            record.error = "timeout" if isinstance(error, TimeoutError) else "connection"
            record.message = str(error)
            if stream:
                stream.transport.close()
        record.end = time.monotonic()
        if results:
            results.send(record)
    if stream:
        stream.transport.close()


def measure(options: argparse.Namespace) -> list[Record]:
    context = multiprocessing.get_context("spawn")
    num_processes = min(options.processes, options.concurrency)
    shared = context.Value("q", 0), context.Value("q", 0), context.Barrier(num_processes)
    processes, records = {}, []
    try:
        for i in range(num_processes):
            share = options.concurrency // num_processes + (i < options.concurrency % num_processes)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=send, args=(options, share, shared, sender), daemon=True)
            process.start()
            sender.close()  # its end here, so that the process's end is seen
            processes[receiver] = process
        receivers = list(processes)
        with tqdm(total=options.requests, unit="req") as bar:
            while receivers:
                for receiver in cast(list[Connection], wait(receivers)):
                    try:
                        records.append(receiver.recv())
                        bar.update()
                    except EOFError:
                        receivers.remove(receiver)
                        processes[receiver].join()
                        if code := processes[receiver].exitcode:
                            fail(f"a client process ended with exit code {code}", 1)
    finally:
        for process in processes.values():
            process.terminate()
    return records


# ---- the server


@contextlib.contextmanager
def serving(options: argparse.Namespace, flags: list[str]) -> Iterator[float]:
    """A `rayllm serve` of this process's own; how many seconds it took until it was healthy."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", options.port)) == 0:
            fail(f"port {options.port} is taken")
    command = [sys.executable, "-m", "rayllm.cli", "serve", options.model, "--port", str(options.port), *flags]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)  # Ctrl-C reaches it through us
    try:
        while not is_healthy(options.url):
            if process.poll() is not None:
                fail(f"the server ended with exit code {process.returncode}", 2 if process.returncode == 2 else 1)
            time.sleep(0.05)
        yield time.monotonic() - start
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except BaseException:  # too slow, or Ctrl-C once more
            process.kill()
            raise


def get(url: str, api_key: str | None = None) -> bytes:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers), timeout=10) as response:
        return cast(bytes, response.read())


def is_healthy(url: str) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        get(f"{url}/health")
        return True
    return False


def served_model(options: argparse.Namespace, wanted: str | None) -> str:
    try:
        names = [model["id"] for model in json.loads(get(f"{options.url}/v1/models", options.api_key))["data"]]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        fail(f"{options.url}/v1/models does not list models: {error}")
    if not names or (wanted or names[0]) not in names:
        fail(f"--model must be one of {', '.join(names)}, not {wanted}")
    return str(wanted or names[0])


# ---- the report


def report(options: argparse.Namespace, records: list[Record]) -> dict[str, Any]:
    good = [record for record in records if not record.error]
    seconds = max(record.end for record in records) - min(record.start for record in records)
    output_tokens = sum(record.num_tokens for record in good)
    return {
        "url": options.url,
        "model": options.model,
        "concurrency": options.concurrency,
        "requests": options.requests,
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
    """In milliseconds, interpolated; none of nothing."""
    if len(seconds) < 2:
        return {f"p{q}": round(1000 * second, 2) for q in (50, 90, 99) for second in seconds}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{q}": round(1000 * cuts[q - 1], 2) for q in (50, 90, 99)}


def fail(message: str, code: int = 2) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a running service; default: start one here")
    parser.add_argument("--model", help="with --url the model's name, default: the first served; otherwise its path")
    parser.add_argument("--port", type=int, default=8000, help="of the service that is started here")
    parser.add_argument("--api-key")
    parser.add_argument("--concurrency", type=int, required=True, help="requests in flight")
    parser.add_argument("--requests", type=int, required=True, help="requests in all")
    parser.add_argument("--processes", type=int, default=8, help="that send them (8)")
    parser.add_argument("--max-prompt-len", type=int, default=LONGEST, help="scales the prompts, whose longest is 1024")
    parser.add_argument("--max-output-len", type=int, default=LONGEST, help="scales the outputs likewise")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one request, then it is an error (600)")
    parser.add_argument("--seed", type=int, default=random.getrandbits(32), help="of the token ids; default: anew")
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, flags = parser.parse_args(arguments[:end]), arguments[end + 1 :]
    for name in ("concurrency", "requests", "processes", "max_prompt_len", "max_output_len", "timeout"):
        if getattr(options, name) <= 0:
            fail(f"--{name.replace('_', '-')} must be over 0, not {getattr(options, name)}")
    if options.url and (flags or urllib.parse.urlsplit(options.url).scheme not in ("http", "https")):
        fail("flags after -- are for a server started here, without --url" if flags else "--url must be http://HOST:PORT")
    if not (options.url or options.model):
        fail("give --url of a running service, or --model to start one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a server started here must not stay behind
    with contextlib.ExitStack() as stack:
        startup_s, name = None, options.model
        if options.url:
            options.url = options.url.rstrip("/")
        else:
            options.url, name = f"http://127.0.0.1:{options.port}", None
            startup_s = stack.enter_context(serving(options, flags))
        options.model = served_model(options, name)
        records = measure(options)
    line = report(options, records) | ({} if startup_s is None else {"startup_s": round(startup_s, 1)})
    print(json.dumps(line), flush=True)
    if failed := [record for record in records if record.error]:
        message = f"{len(failed)} of {len(records)} requests failed, one with {failed[0].error}: {failed[0].message}"
        print(f"Error: {message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
