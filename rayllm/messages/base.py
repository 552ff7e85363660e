"""What all messages share: their base class, and how token ids are packed."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import msgspec

BYTES_PER_ID = 4


def pack_ids(token_ids: Iterable[int]) -> bytes:
    """Token ids as int32 in native order, `array("i", …)` again at the other end: thousands of them cross at once, and
    lists decode a hundred times slower."""
    return array("i", token_ids).tobytes()


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of all messages; the tag tells them apart in one inbox."""


class Stop(Message, frozen=True, array_like=True):
    """Ends the loop of the driver or shard that gets it."""
