"""Which of several collectors takes a device: each one listens to all topics of its broker and leaves what is another
one's alone, so that a device's numbers, its level and its order are one collector's.

The share of a device follows from its id alone (rendezvous hashing): with one collector more or less, only the devices
that it takes or gives change hands.
"""

import re
from hashlib import blake2b

from stonechat.errors import ConfigError

_SHARD = re.compile(r"([1-9][0-9]{0,3})/([1-9][0-9]{0,3})")
MAX_SHARDS = 1024


class Shard:
    """text: "2/3" for the second of three, "" for a collector that takes all. Raises ConfigError."""

    def __init__(self, text: str = "") -> None:
        found = _SHARD.fullmatch(text or "1/1")
        number, self.of = (int(part) for part in found.groups()) if found else (0, 0)
        if not found or number > self.of or self.of > MAX_SHARDS:
            raise ConfigError(f"--shard {text}: want N/M, the N-th of M collectors, M up to {MAX_SHARDS}")
        self.number = number
        self.name = text

    def __contains__(self, device: str) -> bool:
        return self.of == 1 or owner(device, self.of) == self.number


def owner(device: str, of: int) -> int:
    """The number, from 1, of the collector that takes a device."""
    name = device.encode(errors="replace")
    return max(range(1, of + 1), key=lambda n: blake2b(name, digest_size=8, salt=n.to_bytes(4)).digest())
