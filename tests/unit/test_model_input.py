"""A step's input on the device against what its rows say, one token at a time."""

from __future__ import annotations

import random
from array import array

import torch

from rayllm.messages.step import StepInput
from rayllm.runner.device import open_device
from rayllm.runner.lanes import Lanes
from rayllm.runner.model_input import Rows, Shape, pack, pack_padding, unpack

BLOCK_SIZE, NUM_LANES, MAX_LEN = 4, 6, 40
NUM_BLOCKS = [30, 20]


def make_lanes(rng: random.Random) -> Lanes:
    """Lanes with random tokens and tables; those of the padding lane are as they are at the start."""
    lanes = Lanes(NUM_LANES, MAX_LEN, BLOCK_SIZE, NUM_BLOCKS, open_device("cpu", [], 1))
    lanes.token_ids[:-1] = torch.randint(1, 1000, lanes.token_ids[:-1].shape, dtype=torch.int32)
    for table, number in zip(lanes.block_tables, NUM_BLOCKS, strict=True):
        table[:-1] = torch.randint(number, table[:-1].shape, dtype=torch.int32)
    return lanes


def make_rows(rng: random.Random) -> tuple[list[tuple[int, ...]], int]:
    """Decodes, then chunks, in lanes of which some are pruned: their slots are behind their positions."""
    lanes = rng.sample(range(NUM_LANES), rng.randint(1, NUM_LANES))
    num_decodes = rng.randint(0, len(lanes))
    rows = []
    for i, lane in enumerate(lanes):
        num_tokens = 1 if i < num_decodes else rng.randint(1, 7)
        position = rng.randint(0, MAX_LEN - num_tokens - 1)
        num_samples = 1 if i < num_decodes else rng.randint(0, 1)
        slots = []
        for _ in NUM_BLOCKS:
            first = rng.randint(0, position)
            slots += [first, first + num_tokens]
        rows.append((lane, position, num_tokens, num_samples, *slots))
    return rows, num_decodes


def test_every_token_is_where_its_row_says(rng: random.Random) -> None:
    for _ in range(50):
        lanes = make_lanes(rng)
        rows, n = make_rows(rng)
        step = StepInput(0, 0, [], [], array("i", [x for row in rows for x in row]).tobytes(), n)
        own = Shape.of(Rows.of(step, 2))
        padded = Shape(
            num_tokens=own.num_tokens + rng.randint(0, 5),
            num_decodes=n + rng.randint(0, 3),
            num_chunks=own.num_chunks + rng.randint(0, 3),
            num_samples=own.num_samples + rng.randint(0, 3),
            max_seqlen_q=64,
            max_kv_len=MAX_LEN,
            num_prunes=0,
        )
        packed = pack(Rows.of(step, 2), padded, lanes.padding)
        inputs = unpack(torch.from_numpy(packed), padded, lanes)
        token, sample = 0, 0
        for i, (lane, position, num_tokens, num_samples, *slots) in enumerate(rows):
            row = i if i < n else i - n + padded.num_decodes
            if i >= n:
                assert inputs.cu_seqlens_q[i - n : i - n + 2].tolist() == [token, token + num_tokens]
            for j in range(num_tokens):
                assert inputs.positions[token + j] == position + j
                assert inputs.token_ids[token + j] == lanes.token_ids[lane, position + j]
                for own_input, table, first in zip(inputs.groups, lanes.block_tables, slots[::2], strict=True):
                    block = int(table[lane, (first + j) // BLOCK_SIZE])
                    assert own_input.slot_mapping[token + j] == block * BLOCK_SIZE + (first + j) % BLOCK_SIZE
            for own_input, table, kv_len in zip(inputs.groups, lanes.block_tables, slots[1::2], strict=True):
                assert own_input.kv_lens[row] == kv_len
                assert torch.equal(own_input.block_tables[row], table[lane])
            token += num_tokens
            if num_samples:
                assert inputs.sample_tokens[sample] == token - 1
                assert (inputs.sample_lanes[sample], inputs.sample_positions[sample]) == (lane, position + num_tokens)
                sample += 1
        assert (token, sample) == (own.num_tokens, own.num_samples)
        assert set(inputs.cu_seqlens_q[own.num_chunks :].tolist()) == {token}


def test_padding_does_no_harm(rng: random.Random) -> None:
    """It writes to the spare blocks, has no keys, and what it draws, perhaps no token at all, it never reads."""
    lanes = make_lanes(rng)
    shape = Shape.of_decodes(5, MAX_LEN)
    inputs = unpack(torch.from_numpy(pack_padding(shape, lanes.padding, 2)), shape, lanes)
    for own, number in zip(inputs.groups, NUM_BLOCKS, strict=True):
        assert (own.slot_mapping // BLOCK_SIZE == number).all()
        assert not own.kv_lens.any()
    assert (inputs.sample_lanes == lanes.padding).all()
    assert not set(inputs.sample_positions.tolist()) & set(inputs.positions.tolist())
