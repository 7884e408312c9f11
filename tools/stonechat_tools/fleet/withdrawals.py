"""Which devices are to hear of a withdrawal now: those that still have the version, or ask for it, each less and less
often. One that can't go back, because the version before is below its floor, gets it less and less often too."""

import time

from .rollout_judge import BUSY_SHARE
from .shards import Shard
from .store import Store, rollouts
from .store.rollouts import Member, RolloutRow

AGAIN_S, AGAIN_MOST_S = 10.0, 6 * 3600.0
MOST = 1000  # devices at a time
_FOR_S = 86_400.0  # a clock that jumps further ahead was wrong


class Withdrawals:
    """devices: those of this collector."""

    def __init__(self, store: Store, devices: Shard) -> None:
        self._store = store
        self._devices = devices
        self._sent: dict[tuple[str, bytes, int], tuple[float, float]] = {}  # when it was sent last, and when again
        self._resting_s: dict[int, float] = {}  # until when nobody is looked for who still has what was withdrawn

    def again(self, device: str, stream: bytes, row: RolloutRow, now_s: float) -> bool:
        """Whether it is time to send it to this start of a device; then it counts as sent."""
        key = (device, stream, row.id)
        sent_s, wait_s = self._sent.get(key, (-1e18, AGAIN_S / 2))
        if 0 <= now_s - sent_s < wait_s:
            return False
        if len(self._sent) > 10 * MOST:
            self._sent = {k: known for k, known in self._sent.items() if now_s - known[0] < known[1]}
        self._sent[key] = (now_s, min(2 * wait_s, AGAIN_MOST_S))
        return True

    def due(self, row: RolloutRow, now_s: float) -> list[Member]:
        """Raises StoreError."""
        if 0 < self._resting_s.get(row.id, 0.0) - now_s < _FOR_S:
            return []
        began_s = time.monotonic()
        left = rollouts.to_withdraw(self._store, row.id, row.release.version, MOST)
        self._resting_s[row.id] = now_s + BUSY_SHARE * (time.monotonic() - began_s)
        return [each for each in left if each.name in self._devices and self.again(each.name, each.stream, row, now_s)]
