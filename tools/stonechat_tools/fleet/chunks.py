"""Serves the chunks of releases: one waits for each device that asked, and they leave as fast as a rate allows.

A device asks for the next chunk when it has the one before, and again where none comes; so what waits here is bounded
by the devices that take a release now, and a hostile one gets no more than its share.
"""

from collections import OrderedDict
from collections.abc import Callable, Container
from dataclasses import dataclass

from stonechat.errors import ConfigError

from . import wire_release
from .keyring import DeviceKeys
from .store import Store, releases
from .waiting import Source

RATE_BYTES = 250_000.0  # a second, of all chunks of a collector
DEVICE_CHUNKS = 20.0  # a second, to one device
MAX_RELEASES = 4  # whose bytes are in memory

Where = Source | None  # a connection to a broker; None: all of them


@dataclass(frozen=True, slots=True)
class _Asked:
    release: int
    want: wire_release.Want
    signer: DeviceKeys
    where: Where


@dataclass(frozen=True, slots=True)
class Chunk:
    """message: sealed; last: nothing of the release is behind it."""

    device: str
    message: bytes
    last: bool
    where: Where


class Chunks:
    """store: has the releases; rate_bytes: a second, to all devices together."""

    def __init__(self, store: Store, clock: Callable[[], float], rate_bytes: float = RATE_BYTES) -> None:
        self._store = store
        self._clock = clock
        self._rate = rate_bytes
        self._left, self._left_s = rate_bytes, clock()  # bytes that may leave, as of when
        self._asked: OrderedDict[str, _Asked] = OrderedDict()
        self._next_s: dict[str, float] = {}  # when a device may have its next one
        self._content: OrderedDict[int, tuple[bytes, bytes]] = OrderedDict()

    def ask(self, release: int, want: wire_release.Want, signer: DeviceKeys, where: Where) -> None:
        """It takes the place of what the same device asked for before."""
        self._asked[signer.device] = _Asked(release, want, signer, where)

    def drop(self, device: str) -> None:
        self._asked.pop(device, None)
        self._next_s.pop(device, None)

    def only(self, devices: Container[str]) -> None:
        """Forget all others."""
        for device in [device for device in {*self._asked, *self._next_s} if device not in devices]:
            self.drop(device)

    def content(self, release: int) -> tuple[bytes, bytes]:
        """The signed manifest and the model. Raises StoreError."""
        found = self._content.get(release)
        if found is None:
            found = self._content[release] = releases.content(self._store, release)
            if len(self._content) > MAX_RELEASES:
                self._content.popitem(last=False)
        self._content.move_to_end(release)
        return found

    def due(self) -> list[Chunk]:
        """What may leave now. Raises StoreError."""
        now_s = self._clock()
        self._left = min(self._rate, self._left + max(0.0, now_s - self._left_s) * self._rate)
        self._left_s = now_s
        found = []
        for device, asked in list(self._asked.items()):
            if self._left <= 0:
                break
            if 0 < self._next_s.get(device, 0.0) - now_s < 1:
                continue
            chunk = self._sealed(device, asked)
            del self._asked[device]
            if chunk is not None:
                self._next_s[device] = now_s + 1 / DEVICE_CHUNKS
                self._left -= len(chunk.message)
                found.append(chunk)
        return found

    def _sealed(self, device: str, asked: _Asked) -> Chunk | None:
        """None where there is no such chunk, or no key for it here."""
        want, content = asked.want, self.content(asked.release)
        part = content[want.part]
        if want.offset >= len(part):
            return None
        try:
            message = wire_release.seal_chunk(asked.signer, want, part)
        except ConfigError:
            return None
        last_part = wire_release.MODEL if content[1] else wire_release.MANIFEST
        last = want.part == last_part and want.offset + wire_release.CHUNK_BYTES >= len(part)
        return Chunk(device, message, last, asked.where)
