"""What crosses between processes arrives as it was sent, and is small."""

from __future__ import annotations

import types
import typing
from array import array

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from rayllm.messages import sequences, step
from rayllm.messages.base import Message, Stop
from rayllm.messages.sequences import DriverMessage, OwnerMessage, Updates
from rayllm.messages.step import StepInput, StepOutput
from rayllm.sampling_params import SamplingParams
from rayllm.scheduling.scheduler import Scheduler
from rayllm.scheduling.sequence import Sequence

INBOXES = {"shard": StepInput | Stop, "driver": DriverMessage, "client": Updates, "owner": OwnerMessage}
LEAVES = {
    bytes: st.binary(max_size=8),
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=8),
    types.NoneType: st.none(),
}
PARAMS = st.builds(
    SamplingParams,
    n=st.integers(1, 128),
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 1000),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 200_000), st.floats(-100, 100), max_size=3),
    seed=st.none() | LEAVES[int],
    max_tokens=st.none() | st.integers(10, 10**6),
    min_tokens=st.integers(0, 10),
    stop=st.none() | st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 200_000), max_size=3),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)


def kinds(inbox) -> tuple[type, ...]:
    return typing.get_args(inbox) or (inbox,)


def instances(hint) -> st.SearchStrategy:
    """Random values of a type that a field has."""
    arguments = typing.get_args(hint)
    if hint is SamplingParams:
        return PARAMS
    if hint in LEAVES:
        return LEAVES[hint]
    if isinstance(hint, types.UnionType):
        return st.one_of(*map(instances, arguments))
    if typing.get_origin(hint) is tuple:
        return st.tuples(*map(instances, arguments))
    if typing.get_origin(hint) is list:
        return st.lists(instances(*arguments), max_size=4)
    if typing.get_origin(hint) is dict:
        return st.dictionaries(*map(instances, arguments), max_size=3)
    return st.builds(hint, **{field.name: instances(field.type) for field in msgspec.structs.fields(hint)})


@pytest.mark.parametrize(
    ("inbox", "message_type"),
    [(inbox, message) for inbox in INBOXES for message in kinds(INBOXES[inbox])],
    ids=lambda value: getattr(value, "__name__", value),
)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_round_trip(inbox, message_type, data):
    message = data.draw(instances(message_type))
    received = msgspec.msgpack.Decoder(INBOXES[inbox]).decode(msgspec.msgpack.encode(message))
    assert type(received) is message_type
    assert received == message


def test_every_message_has_an_inbox():
    everything = {**vars(step), **vars(sequences)}
    messages = {kind for kind in everything.values() if isinstance(kind, type) and issubclass(kind, Message)}
    assert messages - {Message} == {kind for inbox in INBOXES.values() for kind in kinds(inbox)}


def test_foreign_messages_are_refused():
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(Stop()), type=OwnerMessage)


def test_decode_steps_are_small():
    """256 sequences, all of whose blocks fill up at once: less than 8 KiB a step."""
    scheduler = Scheduler(
        num_blocks=[4096], block_size=16, max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=4096
    )
    for i in range(256):
        params = SamplingParams(max_tokens=200, logprobs=1)
        token_ids = array("i", [100_000 + i] * 32)
        scheduler.add(Sequence(0, i, token_ids, params, i, max_tokens=200, stop_token_ids=frozenset({2})))
    sizes = []
    while work := scheduler.schedule():
        if work.num_decodes:
            assert work.num_decodes == 256
            sizes.append(len(msgspec.msgpack.encode(work)))
        num_samples = len(scheduler.in_flight[-1].sampled)
        scheduler.update(StepOutput(work.incarnation, work.step_id, [3] * num_samples))
    assert len(sizes) == 199
    assert max(sizes) < 8 * 1024
