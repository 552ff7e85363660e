"""How steps and tokens travel between processes: ZeroMQ push/pull sockets with msgspec messages.

Ray calls are too slow for steps (about 1 ms a round trip), so Ray only places the processes and notices deaths.
`ipc` serves one node, `tcp` several; both behave alike. ZeroMQ reports no death of a peer: a receiver must not wait
for one without also watching it through Ray.
"""

from __future__ import annotations

import os
import socket
import tempfile
from typing import Any, Generic, TypeVar

import msgspec
import zmq

M = TypeVar("M")

HIGH_WATER_MARK = 100_000
"""Messages queued for a peer that does not read, before sends block."""


class Receiver(Generic[M]):
    """The inbox of one thread. `address` is where senders connect; `host` None binds to this node only."""

    def __init__(self, message_type: Any, host: str | None = None):
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(message_type)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.set_hwm(HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._folder: str | None = None
        if host is None:
            self._folder = tempfile.mkdtemp(prefix="rayllm-", dir="/tmp")  # mode 0700; short: paths end at 107 bytes
            self.address = f"ipc://{self._folder}/{os.getpid()}"
            self._socket.bind(self.address)
        else:
            self.address = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"

    def receive(self, timeout_s: float | None = None) -> list[M]:
        """All messages that are there; waits for the first at most `timeout_s` (None: for ever, 0: not at all)."""
        messages: list[M] = []
        if timeout_s != 0 and not self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return messages
        try:
            while True:
                messages.append(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))
        except zmq.Again:
            return messages

    def fileno(self) -> int:
        """For event loops: readable when messages may have come; then `receive(0)` takes them all."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
        if self._folder:
            path = self.address.removeprefix("ipc://")
            if os.path.exists(path):
                os.unlink(path)
            os.rmdir(self._folder)


class Sender:
    """Sends to one receiver's address; belongs to one thread."""

    def __init__(self, address: str):
        self._encoder = msgspec.msgpack.Encoder()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.set_hwm(HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    def send(self, message: msgspec.Struct) -> None:
        self._socket.send(self._encoder.encode(message))

    def close(self, linger_s: float = 0) -> None:
        """What is not delivered after `linger_s` is dropped."""
        self._socket.close(linger=int(linger_s * 1000))


def local_host() -> str:
    """This node's address as other nodes see it."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address or socket.gethostbyname(socket.gethostname())
