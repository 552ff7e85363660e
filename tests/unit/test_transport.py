"""The sockets between processes: local and remote, with peers that die, fall behind or have no business here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from rayllm.messages.base import Stop
from rayllm.messages.sequences import ClientGone, Ended
from rayllm.messages.transport import NEW_S, Address, Receiver, Sender, remove_abandoned


@pytest.fixture
def inbox() -> Iterator[Receiver]:
    inbox: Receiver = Receiver(Ended | ClientGone | Stop, "127.0.0.1")
    yield inbox
    inbox.close()


@pytest.mark.parametrize("node", ["here", "there"])
def test_messages_arrive_in_order(inbox: Receiver, node: str):
    sender = Sender(inbox.address("here").seen_from(node))
    messages = [Ended([(i, i)]) for i in range(1000)]
    for message in messages:
        sender.send(message)
    received: list[Ended] = []
    while len(received) < len(messages):
        more = inbox.receive(timeout_s=5)
        assert more, "all arrive"
        received += more
    assert received == messages
    assert inbox.receive(timeout_s=0) == []
    sender.close()


def test_an_inbox_of_one_node_has_no_port():
    inbox: Receiver = Receiver(Stop)
    with pytest.raises(AssertionError, match="own node only"):
        inbox.address("here").seen_from("there")
    inbox.close()


def test_only_who_was_told_the_key_gets_in(inbox: Receiver):
    assert inbox.remote is not None
    endpoint = inbox.remote.split(" ")[0]
    other: Receiver = Receiver(Stop, "127.0.0.1")
    assert other.remote is not None
    strangers = [Sender(endpoint), Sender(f"{endpoint} {other.remote.split(' ')[1]}")]
    for stranger in strangers:
        stranger.send(Stop())
    assert inbox.receive(timeout_s=0.5) == []
    friend = Sender(inbox.remote)
    friend.send(Stop())
    assert inbox.receive(timeout_s=5) == [Stop()]
    for sender in (*strangers, friend):
        sender.close()
    other.close()


PEER = """
import sys, time
from rayllm.messages.base import Stop
from rayllm.messages.transport import Receiver
inbox = Receiver(Stop, "127.0.0.1")
print(inbox.local, inbox.remote, sep="\\n", flush=True)
inbox.receive()
print("received", flush=True)
time.sleep(60)
"""


@pytest.fixture
def peer() -> Iterator[tuple[subprocess.Popen[str], Address]]:
    """A process with an inbox."""
    process = subprocess.Popen([sys.executable, "-c", PEER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    local, remote = (process.stdout.readline().strip() for _ in range(2))
    yield process, Address("there", local, remote)
    process.kill()
    process.communicate()


@pytest.mark.parametrize("node", ["here", "there"])
def test_a_killed_peer_is_noticed(inbox: Receiver, peer: tuple[subprocess.Popen[str], Address], node: str):
    process, address = peer
    sender = Sender(address.seen_from(node))
    inbox.watch(sender, ClientGone(3))
    sender.send(Stop())
    assert process.stdout is not None
    assert process.stdout.readline() == "received\n"
    assert inbox.receive(timeout_s=0) == []
    process.kill()
    assert inbox.receive(timeout_s=5) == [ClientGone(3)]
    with pytest.raises(zmq.ZMQError):
        sender.send(Stop())
    sender.close()


def test_sends_never_wait(inbox: Receiver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rayllm.messages.transport.HIGH_WATER_MARK", 10)
    slow: Receiver = Receiver(Stop)
    sender = Sender(slow.local)
    start = time.monotonic()

    def send_all() -> None:
        for _ in range(1000):
            sender.send(Stop())

    with pytest.raises(zmq.Again):
        send_all()
    assert time.monotonic() - start < 5
    sender.close()
    slow.close()


def test_what_killed_processes_leave_is_removed(inbox: Receiver, peer: tuple[subprocess.Popen[str], Address]):
    process, address = peer
    own, theirs = (Path(local.removeprefix("ipc://")).parent for local in (inbox.local, address.local))
    long_ago = time.time() - NEW_S - 1
    for folder in (own, theirs):
        os.utime(folder, (long_ago, long_ago))
    remove_abandoned()
    assert own.exists() and theirs.exists(), "both are in use"
    process.kill()
    process.wait()
    remove_abandoned()
    assert own.exists() and not theirs.exists()
