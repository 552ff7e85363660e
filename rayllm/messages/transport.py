"""How steps and tokens travel between processes: ZeroMQ push/pull sockets with msgspec messages.

Ray calls are too slow for steps (about 1 ms a round trip), so Ray only places the processes and notices deaths.
`ipc` serves one node, `tcp` several; both behave alike. ZeroMQ reports no death of a peer: a receiver must not wait
for one without also watching it through Ray.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import time
from typing import Any, Generic, TypeVar

import msgspec
import zmq

M = TypeVar("M")

HIGH_WATER_MARK = 100_000
"""Messages queued for a peer that does not read, before sends fail."""

FOLDERS = "rayllm-"
NEW_S = 60
"""A folder this young may not be locked yet."""

HEARTBEAT_MS = 5_000
"""How often peers are asked whether they are there: a node that vanishes closes no connection."""


class Address(msgspec.Struct, frozen=True):
    """Where an inbox is, for senders on its node and on others."""

    node_id: str
    """Ray's id of the inbox's node."""
    local: str
    remote: str | None

    def seen_from(self, node_id: str) -> str:
        """Where senders of that node connect; they can if it is the inbox's own, or the inbox has a remote address."""
        if node_id == self.node_id:
            return self.local
        assert self.remote is not None, "the inbox is open to its own node only"
        return self.remote


class Receiver(Generic[M]):
    """The inbox of one thread.

    Senders of this node connect to `local`; with `host`, those of other nodes to `remote`. A remote address holds
    the public key of a CURVE connection: encrypted, and closed to whoever was not told the address.
    """

    def __init__(self, message_type: Any, host: str | None = None):
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(message_type)
        self._folder = tempfile.mkdtemp(prefix=FOLDERS, dir="/tmp")  # mode 0700; short: paths end at 107 bytes
        self._lock = _lock(self._folder)
        self.local = f"ipc://{self._folder}/{os.getpid()}"
        self.remote: str | None = None
        self._sockets = [_socket(zmq.PULL)]
        self._sockets[0].bind(self.local)
        if host is not None:
            public, secret = zmq.curve_keypair()
            self._sockets.append(_socket(zmq.PULL, curve_server=1, curve_secretkey=secret))
            port = self._sockets[1].bind_to_random_port(f"tcp://{host}")
            self.remote = f"tcp://{host}:{port} {public.decode()}"
        self._poller = zmq.Poller()
        for own in self._sockets:
            self._poller.register(own, zmq.POLLIN)
        self._watched: dict[Any, tuple[Sender, M]] = {}

    def address(self, node_id: str) -> Address:
        """The address to tell others; `node_id` is this node's."""
        return Address(node_id, self.local, self.remote)

    def watch(self, sender: Sender, message: M) -> None:
        """`receive` returns `message` when the receiver that `sender` is connected to has gone."""
        monitor = sender.monitor()
        self._watched[monitor] = sender, message
        self._poller.register(monitor, zmq.POLLIN)

    def receive(self, timeout_s: float | None = None) -> list[M]:
        """All messages that are there; waits for the first at most `timeout_s` (None: for ever, 0: not at all)."""
        messages: list[M] = []
        for ready, _ in self._poller.poll(None if timeout_s is None else int(timeout_s * 1000)):
            if ready in self._watched:
                self._poller.unregister(ready)
                sender, message = self._watched.pop(ready)
                sender.close()
                messages.append(message)
                continue
            with contextlib.suppress(zmq.Again):
                while True:
                    messages.append(self._decoder.decode(ready.recv(zmq.NOBLOCK)))
        return messages

    def filenos(self) -> list[int]:
        """For event loops: one is readable when messages may have come; then `receive(0)` takes them all."""
        return [own.fileno() for own in self._sockets]

    def close(self) -> None:
        """Drops what was not received, and removes the inbox's folder."""
        for own in self._sockets:
            own.close()
        shutil.rmtree(self._folder)
        os.close(self._lock)


class Sender:
    """Sends to one receiver's address; belongs to one thread."""

    def __init__(self, address: str):
        self._encoder = msgspec.msgpack.Encoder()
        endpoint, _, server_key = address.partition(" ")
        options: dict[str, Any] = {}
        if server_key:
            public, secret = zmq.curve_keypair()
            options = {"curve_serverkey": server_key.encode(), "curve_publickey": public, "curve_secretkey": secret}
        self._socket = _socket(zmq.PUSH, **options)
        self._socket.connect(endpoint)

    def send(self, message: msgspec.Struct) -> None:
        """Never waits; raises `zmq.Again` when the receiver is `HIGH_WATER_MARK` messages behind."""
        self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)

    def monitor(self) -> Any:
        """A socket that is readable when the connection has broken."""
        return self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def close(self, linger_s: float = 0) -> None:
        """What is not delivered after `linger_s` is dropped."""
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._socket.close(linger=int(linger_s * 1000))


def remove_abandoned() -> None:
    """Removes what killed processes left behind: their folders, whose locks nobody holds any more."""
    for folder in glob.glob(f"/tmp/{FOLDERS}*"):
        with contextlib.suppress(OSError):  # in use, somebody else's, or gone
            if time.time() - os.stat(folder).st_mtime > NEW_S:
                os.close(_lock(folder))
                shutil.rmtree(folder)


def _lock(folder: str) -> int:
    """A file that is locked as long as it stays open; raises `OSError` if another process has it."""
    lock = os.open(f"{folder}/lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _socket(kind: int, **options: Any) -> Any:
    new: Any = zmq.Context.instance().socket(kind)
    new.set_hwm(HIGH_WATER_MARK)
    new.setsockopt(zmq.LINGER, 0)
    new.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    for name, value in options.items():
        setattr(new, name, value)
    return new
