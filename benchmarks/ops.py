"""Speed of the attention and sampling kernels on one GPU: one JSON line per measurement.

    python benchmarks/ops.py

bfloat16, 16 query heads, 8 KV heads, head dimension 128, as in Qwen3-0.6B. Each figure is the median over replays
of a CUDA graph that holds several calls (prefill: over calls, since FlashAttention-4 allocates as it goes). Where
the data would fit the L2 cache, calls rotate through copies of it, except in lines that say so.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from statistics import median

import torch
import torch.nn.functional as F
from rayllm_kernels import (
    PagedKV,
    compact_kv,
    decode_attention,
    divide_decodes,
    filter_logits,
    prefill_attention,
    prefill_backend,
    sample_gumbel,
    select_kept,
    window_scores,
)
from rayllm_kernels.prefill_attention import _prefill_attention_flash, _prefill_attention_triton

HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128
SCALE = HEAD_DIM**-0.5
DTYPE = torch.bfloat16
VOCAB_SIZE = 151_936


def microseconds(run: Callable[[], object], repeats: int = 30) -> float:
    """Median time of `run` on the GPU."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return median(times[3:])


def graph_microseconds(calls: Sequence[Callable[[], object]], rounds: int = 1) -> float:
    """Median time of one of `calls`, run one after the other, `rounds` times, in a CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in list(calls) * rounds:
            call()
    return microseconds(graph.replay) / (len(calls) * rounds)


def report(op: str, case: str, time: float, **figures: float) -> None:
    print(json.dumps({"op": op, "case": case, "us": round(time, 1), **figures}), flush=True)


def paged_cache(kv_lens: Sequence[int], block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Caches of random keys and values, and shuffled block tables for sequences of `kv_lens`."""
    blocks = [-(-n // block_size) for n in kv_lens]
    shape = (sum(blocks), block_size, KV_HEADS, HEAD_DIM)
    k_cache, v_cache = (torch.randn(shape, dtype=DTYPE, device="cuda") for _ in range(2))
    order = torch.randperm(sum(blocks), dtype=torch.int32)
    tables = torch.zeros(len(kv_lens), max(blocks), dtype=torch.int32)
    for row, (end, count) in enumerate(zip(accumulate(blocks), blocks, strict=True)):
        tables[row, :count] = order[end - count : end]
    return k_cache, v_cache, tables.cuda()


def bench_decode(
    case: str, kv_lens: Sequence[int], block_size: int = 128, max_kv_len: int = 0, rotate: bool = True
) -> None:
    kv_bytes = sum(kv_lens) * 2 * KV_HEADS * HEAD_DIM * DTYPE.itemsize
    copies = -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // kv_bytes) if rotate else 1
    lengths = torch.tensor(kv_lens, dtype=torch.int32, device="cuda")
    q = torch.randn(len(kv_lens), HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
    longest = max_kv_len or max(kv_lens)

    caches = [paged_cache(kv_lens, block_size) for _ in range(copies)]
    items = divide_decodes(lengths, caches[0][0])  # once a step, not in each layer

    def call(k_cache: torch.Tensor, v_cache: torch.Tensor, tables: torch.Tensor) -> Callable[[], object]:
        return lambda: decode_attention(q, PagedKV(k_cache, v_cache, tables, lengths, longest), SCALE, items)

    time = graph_microseconds([call(*cache) for cache in caches], rounds=max(1, 20 // copies))
    report("decode_attention", f"{case}, block {block_size}", time, tb_per_s=round(kv_bytes / time / 1e6, 3))


def bench_prefill(sequences: int, query_len: int, context: int) -> None:
    """The first chunk of `sequences` prompts, or a later one over `context` cached keys each."""
    kv_len, block_size = query_len + context, 128
    tokens = sequences * query_len
    q = torch.randn(tokens, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
    k, v = (torch.randn(tokens, KV_HEADS, HEAD_DIM, dtype=DTYPE, device="cuda") for _ in range(2))
    starts = torch.arange(sequences + 1, dtype=torch.int32, device="cuda") * query_len
    kv_lens = torch.full((sequences,), kv_len, dtype=torch.int32, device="cuda")
    cache = paged_cache([kv_len] * sequences, block_size)
    args = (q, PagedKV(*cache, kv_lens, kv_len), starts, query_len, SCALE)
    query, key, value = (x.view(sequences, query_len, -1, HEAD_DIM).transpose(1, 2) for x in (q, k, v))

    runs: dict[str, Callable[[], object]] = {"triton": lambda: _prefill_attention_triton(*args)}
    if prefill_backend(DTYPE, HEAD_DIM) == "flash_attn_4":
        runs["flash_attn_4"] = lambda: _prefill_attention_flash(*args)
    if not context:
        runs["torch sdpa"] = lambda: F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=SCALE, enable_gqa=True
        )
    flops = 4 * HEADS * HEAD_DIM * sequences * query_len * (context + query_len / 2)
    for name, run in runs.items():
        time = microseconds(run)
        case = f"{sequences}x{query_len} over {context}, {name}"
        report("prefill_attention", case, time, tflop_per_s=round(flops / time / 1e6, 1))


def bench_sampling(rows: int, temperature: float) -> None:
    logits = torch.randn(rows, VOCAB_SIZE, dtype=DTYPE, device="cuda")
    seeds, indices = (torch.arange(rows, device="cuda") for _ in range(2))
    temperatures = torch.full((rows,), temperature, device="cuda")
    time = graph_microseconds([lambda: sample_gumbel(logits, temperatures, seeds, indices)], rounds=20)
    report("sample_gumbel", f"{rows}x{VOCAB_SIZE}, temperature {temperature}", time)


def bench_filter(rows: int, top_k: int, top_p: float) -> None:
    logits = torch.randn(rows, VOCAB_SIZE, device="cuda") * 3
    ks = torch.full((rows,), top_k, device="cuda")
    temperatures, ps, zeros = (torch.full((rows,), x, device="cuda") for x in (0.6, top_p, 0.0))
    time = microseconds(lambda: filter_logits(logits, temperatures, ks, ps, zeros))
    report("filter_logits", f"{rows}x{VOCAB_SIZE}, top_k {top_k}, top_p {top_p}", time)


def bench_pruning(kv_len: int, layers: int, heads: int, weights: float) -> None:
    """Pruning one prompt to 2,048 tokens in all layers, and its share of the time that the prompt's prefill takes.

    `weights`: of a layer, whose products are taken to run at 700 TFLOP/s; attention is measured.
    """
    window, kept, block_size = 32, 2048, 128
    blocks, new_blocks = -(-kv_len // block_size), kept // block_size
    shape = (layers, blocks + new_blocks, block_size, KV_HEADS, HEAD_DIM)
    k_cache, v_cache = (torch.randn(shape, dtype=DTYPE, device="cuda") for _ in range(2))
    table, new_table = torch.randperm(shape[1], device="cuda", dtype=torch.int32).split((blocks, new_blocks))
    q = torch.randn(layers, window, heads, HEAD_DIM, dtype=DTYPE, device="cuda")
    score = partial(window_scores, q, k_cache, table, kv_len, SCALE)
    select = partial(select_kept, score(), kept, sinks=4, window=window, pool_width=15)
    compact = partial(compact_kv, k_cache, v_cache, table, select(), new_table)
    parts = {"score": microseconds(score), "select": microseconds(select), "compact": microseconds(compact)}
    tokens = 8192
    queries = torch.randn(tokens, heads, HEAD_DIM, dtype=DTYPE, device="cuda")
    starts = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")

    def prefill_chunk(end: int) -> float:
        length = torch.tensor([end], dtype=torch.int32, device="cuda")
        kv = PagedKV(k_cache[0], v_cache[0], table[None], length, end)
        return microseconds(lambda: prefill_attention(queries, kv, starts, tokens, SCALE), repeats=3)

    # the chunks that are whole: the share comes out a little too large
    attention = sum(prefill_chunk(end) for end in range(tokens, kv_len + 1, tokens))
    prefill = layers * (attention + 2 * weights * kv_len / 700e6)
    total = sum(parts.values())
    figures = {name: round(time, 1) for name, time in parts.items()}
    report("pruning", f"{kv_len} in {layers} layers, {heads} heads", total, **figures, share=round(total / prefill, 4))


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/ops.py measures GPU kernels; this machine has no GPU that torch can use")
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "prefill": prefill_backend(DTYPE, HEAD_DIM)}))
    rng = random.Random(0)
    for block_size in (128, 64, 16):
        bench_decode("256x1024", [1024] * 256, block_size)
    bench_decode("256x1024, launched for 40960", [1024] * 256, max_kv_len=40_960)
    bench_decode("64x1024", [1024] * 64)
    bench_decode("16x32000", [32_000] * 16)
    bench_decode("256 of 30 to 10000", [rng.randint(30, 10_000) for _ in range(256)])
    bench_decode("64 of 1 to 32000", [rng.randint(1, 32_000) for _ in range(64)])
    bench_decode("1x8192", [8192])
    bench_decode("1x8192 in L2", [8192], rotate=False)
    bench_decode("16x384", [384] * 16)
    bench_decode("1x384", [384])
    bench_prefill(32, 2048, context=0)
    bench_prefill(8, 2048, context=8192)
    bench_pruning(32_000, 28, HEADS, weights=15.7e6)  # Qwen3-0.6B
    bench_pruning(131_072, 36, 32, weights=193e6)  # Qwen3-8B
    for rows in (1, 256):
        for temperature in (0.0, 0.6):
            bench_sampling(rows, temperature)
        for top_k, top_p in ((20, 1.0), (0, 0.95), (20, 0.95)):
            bench_filter(rows, top_k, top_p)


if __name__ == "__main__":
    main()
