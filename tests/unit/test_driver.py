"""The driver's loop over the real transport, led against shards that the test plays."""

from __future__ import annotations

import gc
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from shard_model import decode_lanes, rows_of

from rayllm.checkpoint.sources import ModelSource
from rayllm.config import EngineArgs
from rayllm.engine.driver import SHORT_STEP_S, STEPS_IN_FLIGHT, Driver
from rayllm.errors import EngineDeadError
from rayllm.messages.base import Stop, pack_ids
from rayllm.messages.sequences import (
    Abort,
    AddClient,
    AddSequence,
    ClientGone,
    DriverMessage,
    Ended,
    EngineDied,
    NewSequence,
    OwnerMessage,
    SequenceUpdate,
    Updates,
)
from rayllm.messages.step import ShardFailed, StepInput, StepOutput, StepTimes
from rayllm.messages.transport import Receiver, Sender
from rayllm.model_config import LayerConfig, ModelConfig
from rayllm.sampling_params import SamplingParams
from rayllm.scheduling.scheduler import Scheduler

INCARNATION = 3
EOS = 9
TIMEOUT_S = 10
SILENCE_S = 0.2
"""So long nothing may come where nothing should."""

MODEL = ModelConfig(
    model_type="llama",
    vocab_size=10,
    hidden_size=8,
    intermediate_size=8,
    layers=(LayerConfig(),),
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
)
CONFIG = EngineArgs(model="m", max_num_seqs=4, max_model_len=64, block_size=4).resolve(MODEL, "cpu")


class Inbox:
    """A receiver that gives one message at a time."""

    def __init__(self, message_type: object):
        self.receiver: Receiver[Any] = Receiver(message_type)
        self.address = self.receiver.local
        self._messages: deque[Any] = deque()

    def get(self) -> Any:
        if not self._messages:
            self._messages.extend(self.receiver.receive(TIMEOUT_S))
        return self._messages.popleft()

    def is_silent(self) -> bool:
        return not self._messages and not self.receiver.receive(SILENCE_S)


class Peers:
    """Everyone a driver talks to: two shards, of which the first answers, its owner and two clients."""

    def __init__(self) -> None:
        self.driver = Driver(CONFIG, ModelSource("", "dummy", MODEL, None), INCARNATION)
        self.shards = [Inbox(StepInput | Stop) for _ in range(2)]
        # what Driver.start does with the help of Ray
        self.driver._inbox = Receiver(DriverMessage)
        self.owner = Inbox(OwnerMessage)
        self.driver._owner = Sender(self.owner.address)
        self.driver._senders = [Sender(shard.address) for shard in self.shards]
        self.driver.scheduler = Scheduler(
            num_blocks=[16],
            block_size=4,
            max_num_seqs=4,
            max_num_batched_tokens=32,
            max_model_len=64,
            incarnation=INCARNATION,
        )
        self.to_driver = Sender(self.driver._inbox.local)
        self.clients = [Inbox(Updates) for _ in range(2)]
        for number, client in enumerate(self.clients):
            self.to_driver.send(AddClient(number, client.address))
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.driver.run()
        except BaseException as error:
            self.error = error

    def add(self, sequence: int = 0, client: int = 0, max_tokens: int = 4) -> None:
        params = SamplingParams(max_tokens=max_tokens)
        self.to_driver.send(AddSequence(client, NewSequence(sequence, pack_ids([1, 2, 3]), 3, params, 0, None, [EOS])))

    def answer(self, step: StepInput, *token_ids: int, incarnation: int = INCARNATION, device_s: float = 0.0) -> None:
        times = StepTimes(device_s=device_s)
        self.to_driver.send(StepOutput(incarnation, step.step_id, list(token_ids), times=times))

    def step(self) -> StepInput:
        """The next one, which both shards get."""
        first, second = (shard.get() for shard in self.shards)
        assert first == second
        assert isinstance(first, StepInput)
        return first

    def no_step(self) -> bool:
        return all(shard.is_silent() for shard in self.shards)

    def updates(self, client: int = 0) -> list[SequenceUpdate]:
        message = self.clients[client].get()
        assert isinstance(message, Updates)
        return message.updates

    def stop(self) -> None:
        if self.thread.is_alive():
            self.to_driver.send(Stop())
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive()

    def close(self) -> None:
        self.stop()
        self.to_driver.close()
        for inbox in (*self.shards, *self.clients, self.owner):
            inbox.receiver.close()


@pytest.fixture
def peers() -> Iterator[Peers]:
    peers = Peers()
    yield peers
    peers.close()
    gc.unfreeze()  # the driver thinks that the process is its own


def test_every_step_is_sent_before_the_last_one_is_answered(peers: Peers):
    """So the shards never wait; and never are more than two steps on their way, nor one whose tokens nobody wants."""
    peers.add(max_tokens=5)
    step = peers.step()
    for token_id in range(1, 5):
        ahead = peers.step()
        assert (ahead.step_id, decode_lanes(ahead)) == (step.step_id + 1, [0])
        if token_id == 2:
            assert peers.no_step(), f"more than {STEPS_IN_FLIGHT} steps in flight"
        peers.answer(step, token_id)
        assert [(u.token_ids, u.finish_reason) for u in peers.updates()] == [([token_id], None)]
        step = ahead
    assert peers.no_step()
    peers.answer(step, 5)
    assert [(u.token_ids, u.finish_reason) for u in peers.updates()] == [([5], "length")]


def test_short_steps_have_one_more_in_flight(peers: Peers):
    peers.add(max_tokens=9)
    steps = [peers.step(), peers.step()]
    for i in range(3):
        assert peers.no_step()
        peers.answer(steps[i], 1, device_s=SHORT_STEP_S / 2 if i < 2 else SHORT_STEP_S)
        peers.updates()
        if i < 2:
            steps += [peers.step() for _ in range(2 - i)]
    assert [step.step_id for step in steps] == list(range(steps[0].step_id, steps[0].step_id + 5))
    assert peers.no_step(), "two are in flight again"


def test_a_row_behind_the_end_is_dropped(peers: Peers):
    peers.add()
    first, wasted = peers.step(), peers.step()
    peers.answer(first, EOS)
    [update] = peers.updates()
    assert (update.token_ids, update.finish_reason, update.stop_token_id) == ([EOS], "stop", EOS)
    peers.answer(wasted, 5)
    assert peers.no_step()
    assert peers.clients[0].is_silent()


def test_clients_get_one_message_a_step_with_their_own(peers: Peers):
    peers.add(sequence=0, client=0)
    first = peers.step()  # the others come in time for the second
    peers.add(sequence=1, client=0)
    peers.add(sequence=0, client=1)
    second = peers.step()
    while len(second.starts) + second.num_decodes < 3:  # or for later ones, if the second was already on its way
        peers.answer(first, *range(len(rows_of(first))))
        peers.updates(0)
        first, second = second, peers.step()
    peers.answer(first, *range(len(rows_of(first))))
    assert [u.sequence_id for u in peers.updates(0)] in ([0], [0, 1])
    peers.answer(second, *range(len(rows_of(second))))
    assert [u.sequence_id for u in peers.updates(0)] == [0, 1]
    assert [u.sequence_id for u in peers.updates(1)] == [0]


def test_answers_of_another_incarnation_are_ignored(peers: Peers):
    peers.add()
    step = peers.step()
    peers.answer(step, 1, incarnation=INCARNATION - 1)
    peers.answer(step, 2)
    assert [u.token_ids for u in peers.updates()] == [[2]]


def test_abort_frees_everything(peers: Peers):
    peers.add(max_tokens=40)
    first, second = peers.step(), peers.step()
    peers.to_driver.send(Abort(0, [0, 77]))
    peers.answer(first, 1)
    peers.answer(second, 2)
    assert peers.no_step()
    assert peers.clients[0].is_silent()
    assert peers.driver.scheduler.num_free_blocks == 16
    peers.driver.scheduler.check_integrity()


def test_stop_reaches_the_shards(peers: Peers):
    peers.stop()
    assert peers.error is None
    assert [shard.get() for shard in peers.shards] == [Stop(), Stop()]


def fail_shard(peers: Peers) -> None:
    peers.to_driver.send(ShardFailed(INCARNATION, "shard 1 died"))


def answer_out_of_turn(peers: Peers) -> None:
    peers.to_driver.send(StepOutput(INCARNATION, 100, [1]))


@pytest.mark.parametrize(
    ("fail", "kind", "reason"),
    [
        (fail_shard, EngineDeadError, "shard 1 died"),
        (answer_out_of_turn, Exception, "driver: .*"),
    ],
)
def test_failure_is_told_to_the_owner(peers: Peers, fail: Callable[[Peers], None], kind: type, reason: str):
    fail(peers)
    message = peers.owner.get()
    assert isinstance(message, EngineDied)
    assert re.fullmatch(reason, message.reason)
    peers.thread.join(TIMEOUT_S)
    assert isinstance(peers.error, kind)
    assert [shard.get() for shard in peers.shards] == [Stop(), Stop()]


def test_the_owner_learns_which_sequences_ended(peers: Peers):
    peers.add(sequence=7, client=1, max_tokens=1)
    peers.answer(peers.step(), 4)
    assert peers.owner.get() == Ended([(1, 7)])
    peers.add(sequence=8, client=1, max_tokens=9)
    peers.answer(peers.step(), 4)
    assert peers.owner.is_silent()


def test_a_client_that_goes_leaves_nothing(peers: Peers):
    peers.add(sequence=0, client=1, max_tokens=40)
    first, second = peers.step(), peers.step()
    peers.clients.pop(1).receiver.close()
    assert peers.owner.get() == ClientGone(1)
    peers.add(sequence=0, client=0, max_tokens=1)
    peers.answer(first, 1)
    peers.answer(second, 2)
    peers.answer(peers.step(), 3)
    assert [u.token_ids for u in peers.updates(0)] == [[3]], "the others are served on"
    assert peers.no_step()
    assert peers.driver.scheduler.num_free_blocks == 16


def test_a_sequence_goes_on_from_its_output(peers: Peers):
    """As after the death of the engine that began it."""
    new = NewSequence(0, pack_ids([1, 2, 3, 4, 5]), 3, SamplingParams(max_tokens=4), seed=0)
    peers.to_driver.send(AddSequence(0, new))
    step = peers.step()
    [start] = step.starts
    [row] = rows_of(step)
    assert (start.num_prompt_tokens, row.lane, row.num_tokens) == (3, start.lane, 5)
    peers.answer(step, 6)
    peers.answer(peers.step(), 7)
    assert [u.finish_reason for u in peers.updates() + peers.updates()] == [None, "length"]
