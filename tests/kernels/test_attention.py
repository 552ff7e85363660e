"""Decode and prefill attention: references against float64 loops, the GPU's kernels against references."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import pytest
import torch
from kernel_testing import assert_close, poisoned
from rayllm_kernels import PagedKV, decode_attention, divide_decodes, prefill_attention, prefill_backend
from rayllm_kernels.decode_attention import (
    DecodeItems,
    _decode_attention_triton,
    _divide_triton,
    _plan,
    decode_attention_reference,
)
from rayllm_kernels.prefill_attention import (
    _prefill_attention_flash,
    _prefill_attention_triton,
    prefill_attention_reference,
)

GARBAGE = 2**30  # a block far outside of any cache: reading it fails
CPU = torch.device("cpu")


@dataclass
class Batch:
    """Sequences of `kv_lens` keys in a KV cache; of each, the last `query_lens` tokens have queries."""

    q: torch.Tensor
    keys: list[torch.Tensor]  # of each sequence, in order: [kv_len, Hkv, D]
    values: list[torch.Tensor]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    kv_lens: torch.Tensor
    query_lens: list[int]
    scale: float

    def decode_args(self, max_kv_len: int | None = None) -> tuple:
        return self.q, self.paged_kv(max_kv_len), self.scale

    def prefill_args(self, first: int = 0) -> tuple:
        """`first`: of the chunks' tokens, when others are before them."""
        starts = torch.tensor([first, *self.query_lens]).cumsum(0).to(self.q.device, torch.int32)
        return self.q, self.paged_kv(), starts, max(self.query_lens), self.scale

    def paged_kv(self, max_kv_len: int | None = None) -> PagedKV:
        longest = max_kv_len or int(self.kv_lens.max())
        return PagedKV(self.k_cache, self.v_cache, self.block_tables, self.kv_lens, longest)


def make_batch(
    kv_lens: list[int],
    query_lens: list[int],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    unused: float = torch.nan,
    garbage: int = GARBAGE,
) -> Batch:
    """Random tensors; slots that hold no key are `unused`, tables past a sequence's end hold `garbage`."""
    num_heads, num_kv_heads = heads
    blocks = [ceil(n / block_size) for n in kv_lens]
    order = torch.randperm(sum(blocks) + 3)
    tables = torch.full((len(kv_lens), max(blocks) + 2), garbage, dtype=torch.int32)
    shape = (len(order), block_size, num_kv_heads, head_dim)
    caches = [torch.full(shape, unused, dtype=dtype, device=device) for _ in "kv"]
    contiguous: list[list[torch.Tensor]] = [[], []]
    for row, (kv_len, count) in enumerate(zip(kv_lens, blocks, strict=True)):
        mine, order = order[:count], order[count:]
        tables[row, :count] = mine
        for cache, sequences in zip(caches, contiguous, strict=True):
            sequence = torch.randn(kv_len, num_kv_heads, head_dim, dtype=dtype, device=device)
            sequences.append(sequence)
            for i, block in enumerate(mine.tolist()):
                part = sequence[i * block_size : (i + 1) * block_size]
                cache[block, : len(part)] = part
    # Queries, as the engine has them: a view into the projection of queries, keys and values.
    projected = torch.randn(sum(query_lens), num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device=device)
    return Batch(
        projected[:, :num_heads],
        *contiguous,
        *caches,
        tables.to(device),
        torch.tensor(kv_lens, dtype=torch.int32, device=device),
        query_lens,
        scale=float(torch.rand(1) + 0.5) / head_dim**0.5,
    )


def few_items(batch: Batch) -> DecodeItems:
    """Splits as long as those of the many items that fill a GPU; the interpreter takes seconds for idle ones."""
    sequences, kv_heads = len(batch.kv_lens), batch.k_cache.shape[2]
    plan = _plan(sequences, kv_heads, batch.q.shape[2], batch.q.dtype)
    return _divide_triton(batch.kv_lens, plan._replace(num_items=sequences + 12), kv_heads)


def naive_attention(batch: Batch) -> torch.Tensor:
    """Softmax attention in float64, one query and one head after the other."""
    q = batch.q.double()
    group = q.shape[1] // batch.keys[0].shape[1]
    out, row = torch.zeros_like(q), 0
    for key, value, query_len in zip(batch.keys, batch.values, batch.query_lens, strict=True):
        for i in range(query_len):
            seen = len(key) - query_len + i + 1
            for head in range(q.shape[1] if seen else 0):
                scores = key[:seen, head // group].double() @ q[row, head] * batch.scale
                out[row, head] = scores.softmax(0) @ value[:seen, head // group].double()
            row += 1
    return out


@pytest.mark.parametrize("kv_lens", [[37, 1, 0, 64, 5], [21, 21], [64]])
def test_decode_reference_is_softmax_attention(kv_lens: list[int]) -> None:
    batch = make_batch(kv_lens, [1] * len(kv_lens), heads=(6, 2), head_dim=24, block_size=8)
    for max_kv_len in (max(kv_lens), max(kv_lens) + 8):
        out = torch.zeros_like(batch.q)
        assert decode_attention(*batch.decode_args(max_kv_len), out=out) is out
        assert_close(out, naive_attention(batch))
    has_keys = batch.kv_lens > 0
    assert_close(decode_attention(*batch.decode_args())[has_keys], naive_attention(batch)[has_keys])


@pytest.mark.parametrize("has_context", [False, True])
def test_prefill_reference_is_causal_softmax_attention(has_context: bool) -> None:
    query_lens = [13, 1, 0, 20]
    kv_lens = [29, 17, 0, 20] if has_context else query_lens
    batch = make_batch(kv_lens, query_lens, heads=(6, 2), head_dim=24, block_size=4)
    assert_close(prefill_attention(*batch.prefill_args()), naive_attention(batch))


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [((2, 2), 16, 4), ((9, 3), 64, 16), ((8, 1), 96, 32), ((20, 1), 80, 8), ((4, 2), 128, 128)],
)
def test_decode_triton(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, block_size: int
) -> None:
    kv_lens = [*torch.randint(1, 300, (2,)).tolist(), 0, 1, 65]
    batch = make_batch(kv_lens, [1] * 5, heads, head_dim, block_size, dtype, device)
    args = batch.decode_args()
    expected, before = decode_attention_reference(*args), torch.randn_like(batch.q).contiguous()
    with poisoned():
        items = few_items(batch) if device.type == "cpu" else None
        out = _decode_attention_triton(*args, items)
        over = _decode_attention_triton(*args, items, before.clone())
    has_keys = batch.kv_lens > 0
    for result in (out, over):
        assert_close(result[has_keys], expected[has_keys])
    assert torch.equal(over[2], before[2])


def test_decode_triton_divides_for_itself(device: torch.device) -> None:
    """Among hundreds of items, most of them idle."""
    batch = make_batch([150], [1], device=device)
    with poisoned():
        out = _decode_attention_triton(*batch.decode_args())
    assert_close(out, decode_attention_reference(*batch.decode_args()))


def test_layers_share_how_decodes_are_divided(device: torch.device) -> None:
    """One sequence much longer than the others; splits are combined by the last one, in every layer."""
    kv_lens = [*torch.randint(1, 40, (6,)).tolist(), 900]
    first, second = (make_batch(kv_lens, [1] * 7, device=device) for _ in range(2))
    items = few_items(first)
    with poisoned():
        for batch in (first, second, first):
            out = _decode_attention_triton(*batch.decode_args(), items)
            assert_close(out, decode_attention_reference(*batch.decode_args()))
            assert not items.arrivals.any()


@pytest.mark.parametrize("seed", range(5))
def test_decodes_are_divided_among_items(device: torch.device, seed: int) -> None:
    """Every key belongs to one item; no split is longer than it must be."""
    generator = torch.Generator().manual_seed(seed)
    batch = int(torch.randint(1, 70, (), generator=generator))
    kv_lens = torch.randint(0, 2 ** int(torch.randint(1, 12, (), generator=generator)), (batch,), generator=generator)
    plan = _plan(batch, 8, 128, torch.bfloat16)
    with poisoned():
        items = _divide_triton(kv_lens.to(device, torch.int32), plan, 8).items.tolist()
    found: dict[int, list[tuple[int, int]]] = {}
    for item, (seq, start, end, first, count) in enumerate(zip(*items, strict=True)):
        if seq >= 0:
            assert 0 <= item - first == len(found.setdefault(seq, [])) < count
            found[seq].append((start, end))
    most = max(plan.min_split, ceil(int(kv_lens.sum()) / (plan.num_items - batch))) + 64
    for seq, kv_len in enumerate(kv_lens.tolist()):
        splits = found.get(seq, [])
        assert [start for start, _ in splits] == [0, *(end for _, end in splits)][: len(splits)]
        assert (splits[-1][1] if splits else 0) == kv_len
        assert all(0 < end - start < most for start, end in splits)


@pytest.mark.parametrize("has_context", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [((2, 2), 16, 4), ((3, 1), 64, 16), ((2, 1), 96, 32), ((2, 1), 128, 128)],
)
def test_prefill_triton(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    has_context: bool,
) -> None:
    query_lens = [int(torch.randint(2, 170, ())), 1, 0, 63]
    context = [int(torch.randint(1, 100, ())), 31, 0, 0] if has_context else [0] * 4
    kv_lens = [n + m for n, m in zip(query_lens, context, strict=True)]
    batch = make_batch(kv_lens, query_lens, heads, head_dim, block_size, dtype, device)
    args = batch.prefill_args()
    with poisoned():
        out = _prefill_attention_triton(*args)
    assert_close(out, prefill_attention_reference(*args))


def test_prefill_among_other_tokens(device: torch.device) -> None:
    """Decode rows come before the chunks, padding after them; neither is touched."""
    batch = make_batch([40, 9], [21, 9], device=device)
    expected = prefill_attention_reference(*batch.prefill_args())
    batch.q = torch.nn.functional.pad(batch.q, (0, 0, 0, 0, 3, 5))
    with poisoned():
        out = _prefill_attention_triton(*batch.prefill_args(first=3))
        reference = prefill_attention_reference(*batch.prefill_args(first=3))
    for result in (out, reference):
        assert_close(result[3:-5], expected)
        assert result[:3].isnan().all()
        assert result[-5:].isnan().all()


def test_prefill_backend_says_what_runs() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        name, _, reason = prefill_backend(dtype).partition(": ")
        assert name in ("flash_attn_4", "triton", "torch")
        assert "\n" not in reason
        assert (name == "torch") != torch.cuda.is_available()
        assert reason or name == "flash_attn_4"


@pytest.mark.gpu
@pytest.mark.parametrize("has_context", [False, True])
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_prefill_flash_attention_4(has_context: bool, block_size: int, head_dim: int) -> None:
    if not prefill_backend(torch.bfloat16, head_dim).startswith("flash_attn_4"):
        pytest.skip(prefill_backend(torch.bfloat16, head_dim))
    query_lens = [1000, 1, 127, 300]
    kv_lens = [3000, 513, 127, 428] if has_context else query_lens
    batch = make_batch(
        kv_lens,
        query_lens,
        (16, 8),
        head_dim,
        block_size,
        torch.bfloat16,
        torch.device("cuda"),
        unused=0,
        garbage=0,
    )
    args = batch.prefill_args()
    out = _prefill_attention_flash(*args)
    assert_close(out, prefill_attention_reference(*args))
    assert_close(out, _prefill_attention_triton(*args))
    assert torch.equal(out, prefill_attention(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_large_batches_on_a_gpu(dtype: torch.dtype, head_dim: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    kv_lens = [*torch.randint(0, 3000, (40,)).tolist(), 9000]
    shapes = ((16, 8), head_dim, 64, dtype, torch.device("cuda"))
    batch = make_batch(kv_lens, [1] * 41, *shapes)
    with poisoned():
        out = decode_attention(*batch.decode_args())
    has_keys = batch.kv_lens > 0
    assert_close(out[has_keys], decode_attention_reference(*batch.decode_args())[has_keys])
    batch = make_batch([2500, 700, 64], [900, 700, 5], *shapes)
    with poisoned():
        out = _prefill_attention_triton(*batch.prefill_args())
    assert_close(out, prefill_attention_reference(*batch.prefill_args()))


@pytest.mark.gpu
def test_decode_in_a_cuda_graph_follows_its_inputs() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    shapes = ((16, 8), 128, 64, torch.bfloat16, torch.device("cuda"))
    first, second = (make_batch(n, [1] * 4, *shapes) for n in ([5, 900, 0, 64], [2000, 1, 70, 333]))
    width = 4096 // 64
    q = first.q.contiguous()
    tables = torch.zeros(4, width, dtype=torch.int32, device="cuda")
    kv_lens = first.kv_lens.clone()
    caches = [torch.zeros(64, 64, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in "kv"]
    args = (q, PagedKV(*caches, tables, kv_lens, 4096), 0.1)

    def load(batch: Batch) -> None:
        q.copy_(batch.q)
        kv_lens.copy_(batch.kv_lens)
        tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        for cache, source in zip(caches, (batch.k_cache, batch.v_cache), strict=True):
            cache[: len(source)] = source

    load(first)
    decode_attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        items = divide_decodes(kv_lens, caches[0])
        for _ in range(2):
            out = decode_attention(*args, items)
    for batch in (first, second):
        load(batch)
        out.fill_(torch.nan)
        graph.replay()
        has_keys = kv_lens > 0
        assert_close(out[has_keys], decode_attention_reference(*args)[has_keys])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_in_a_cuda_graph_is_padded(dtype: torch.dtype) -> None:
    """A graph is captured for more tokens and chunks than the step has; what is left over costs nothing but time."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    query_lens, kv_lens, first = [200, 1, 77], [900, 130, 77], 5
    shapes = ((16, 8), 128, 128, dtype, torch.device("cuda"))
    batch = make_batch(kv_lens, query_lens, *shapes, unused=0, garbage=0)
    expected = prefill_attention_reference(*batch.prefill_args())
    padding = torch.nn.functional.pad
    q = padding(batch.q, (0, 0, 0, 0, first, 512 - first - sum(query_lens)))
    tables = torch.zeros(16, 4096 // 128, dtype=torch.int32, device="cuda")
    tables[:3, : batch.block_tables.shape[1]] = batch.block_tables
    ends = torch.tensor([first, *query_lens]).cumsum(0)
    starts = padding(ends, (0, 13), value=int(ends[-1])).to("cuda", torch.int32)
    lengths = padding(batch.kv_lens, (0, 13))
    args = (q, PagedKV(batch.k_cache, batch.v_cache, tables, lengths, 4096), starts, 512, batch.scale)
    prefill_attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prefill_attention(*args)
    out.fill_(torch.nan)
    graph.replay()
    assert_close(out[first : first + sum(query_lens)], expected)
