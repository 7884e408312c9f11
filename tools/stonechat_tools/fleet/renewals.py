"""Renews leases: while a device's evidence goes on, the collector lets what the device has decided last.

It begins nothing, and can't: a renewal names a lease that the device has drawn. The device refuses it once its evidence
is gone, and opens by itself when none comes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stonechat.errors import ConfigError

from . import keyring, wire
from .shards import Shard
from .store import STORED, Store
from .wire_response import BEGAN, ENDED, seal_renewal

MOST_S = 86_400.0  # since a lease began: then somebody has to look
EXPIRES_S = 120  # a renewal is not taken later
_LEAST_S = 0.3  # between two, whatever a device reports


@dataclass(slots=True)
class _Held:
    lease: int
    stream: bytes  # of the start that drew it, b"" where that is not known
    seconds: int
    began_s: float
    renewed_s: float
    number: int = 0  # of the last renewal


class Renewals:
    """most_s: how long a lease is renewed; keys: with those of the direction "renew". step() gives what is to be sent:
    (None: to every broker, topic, message)."""

    def __init__(
        self,
        store: Store,
        keys: keyring.Keys,
        *,
        prefix: str = wire.PREFIX,
        most_s: float = MOST_S,
        shard: Shard | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._prefix = prefix.rstrip("/") + "/"
        self._most_s = most_s
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._calm: set[str] = set()  # of those: devices whose last window was normal
        self.sent = 0
        now_s = clock()
        seen: set[str] = set()
        for entry in store.decisions(since_s=now_s - most_s, limit=10_000):  # newest first: only a device's last counts
            device = entry["device"]
            if entry["done"] and entry["lease"] and device not in seen and (shard is None or device in shard):
                seen.add(device)
                if entry["kind"] == BEGAN:
                    self._held[device] = _Held(entry["lease"], b"", entry["seconds"], entry["began_s"], 0.0)

    def took(self, reports: Sequence[wire.Report], results: Sequence[str]) -> None:
        """What was committed."""
        for report, result in zip(reports, results, strict=True):
            decided = report.decision
            held = self._held.get(report.device)
            if held is not None and held.stream not in (b"", report.stream) and report.late_s is None:
                held = None  # a new start opens
                del self._held[report.device]
            if decided is not None and result == STORED and decided.done and decided.lease:
                if decided.kind == BEGAN and report.late_s is None:
                    now_s = self._clock()
                    self._held[report.device] = _Held(decided.lease, report.stream, decided.seconds, now_s, now_s)
                    self._calm.discard(report.device)
                elif decided.kind == ENDED and held is not None and held.lease == decided.lease:
                    del self._held[report.device]
            elif report.device in self._held and report.windows and report.late_s is None:
                if report.level:
                    self._calm.discard(report.device)
                else:
                    self._calm.add(report.device)

    def step(self) -> list[tuple[None, str, bytes]]:
        """To be called about once a second."""
        now_s = self._clock()
        found: list[tuple[None, str, bytes]] = []
        for device, held in list(self._held.items()):
            held.began_s = min(held.began_s, now_s)  # a clock may have been put back
            soon = 0 <= now_s - held.renewed_s < max(_LEAST_S, held.seconds / 3)
            if now_s - held.began_s > self._most_s:
                del self._held[device]
            elif device not in self._calm and not soon:
                held.renewed_s = now_s
                message = self._renewal(device, held, now_s)
                if message is not None:
                    found.append((None, f"{self._prefix}{device}/ack", message))
                    self.sent += 1
        return found

    def _renewal(self, device: str, held: _Held, now_s: float) -> bytes | None:
        # by the clock, so that it also rises where the collector is started anew, or a second one renews
        held.number = max(held.number + 1, int(now_s * 1000))
        try:
            keys = self._keys.held(device)[0]
            return seal_renewal(keys, held.number & 0xFFFFFFFF, int(now_s) + EXPIRES_S, held.lease)
        except (ConfigError, keyring.Rejected, IndexError):  # a key file without the key for it
            return None
