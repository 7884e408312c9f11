"""The counters of a MicroPython board, from the hook and the heap.

    collector = BoardCollector(secret)      # secret: bytes of this device, so that learned peers mean nothing elsewhere
    collector.read(values)                  # once a window

A peer becomes known after KNOWN_AFTER windows in which it was seen, not at first sight: a beacon stays new for that
long, and a scan, which meets nobody twice, teaches nothing. At most MAX_KNOWN are remembered; the longest unseen goes.
"""

import gc
from struct import pack_into, unpack_from

from ..compat import const, ticks_ms
from ..errors import CollectorError
from . import hooks
from .schema import MICROPYTHON_1

MAX_KNOWN = const(48)
MAX_CANDIDATES = const(48)
KNOWN_AFTER = const(12)  # windows

_PEERS = const(9)
_DPORTS = const(12)
_BYTES_OUT = const(14)
_WRITES = const(16)
_MEAN_WRITE = const(17)
_HEAP_FREE = const(21)
_LOOP_LAG = const(22)


class BoardCollector:
    """secret: bytes; counter: what hooks.install() gave (None: installs it now, which misses what came before)."""

    schema = MICROPYTHON_1
    sources = (("firmware", "hook", "socket, usocket, open, getaddrinfo"), ("heap", "gc", ""))

    def __init__(self, secret, counter=None):
        self.counter = hooks.install() if counter is None else counter
        self.counter.secret = bytes(secret)
        self.counter.end_window()
        self.hold = False  # True while the device is under suspicion: nobody becomes known
        self._candidates = {}  # key -> windows in which it was seen
        self._window = 0
        self._last_bytes = self._last_writes = 0

    def read(self, values):
        """Fill `values` (len(schema) ints) and begin the next window."""
        counter = self.counter
        values[:] = counter.counts
        values[_PEERS] = len(counter.window_peers)
        values[_DPORTS] = len(counter.window_ports)
        sent = values[_BYTES_OUT] - self._last_bytes & 0x3FFFFFFF
        writes = values[_WRITES] - self._last_writes & 0x3FFFFFFF
        values[_MEAN_WRITE] = sent // writes if writes else 0
        self._last_bytes = values[_BYTES_OUT]
        self._last_writes = values[_WRITES]
        values[_HEAP_FREE] = _heap_free_q8()
        values[_LOOP_LAG] = counter.lag_ms
        self._window += 1
        for key in counter.window_peers:
            self._sighted(key)
        counter.end_window()

    def hold_peers(self, hold):
        """True while the device is under suspicion: no peer becomes known."""
        self.hold = hold

    def _sighted(self, key):
        known = self.counter.known
        if key in known:
            known[key] = self._window
            return
        if self.hold:
            return
        candidates = self._candidates
        windows = candidates.pop(key, 0) + 1
        if windows >= KNOWN_AFTER:
            if len(known) >= MAX_KNOWN:
                del known[min(known, key=lambda key: known[key])]
            known[key] = self._window
            return
        if len(candidates) >= MAX_CANDIDATES:
            candidates.popitem()
        candidates[key] = windows

    def dump(self):
        """The known peers for the state, four bytes each."""
        known = self.counter.known
        packed = bytearray(4 * len(known))
        for i, key in enumerate(sorted(known)):
            pack_into(">I", packed, 4 * i, key)
        return bytes(packed)

    def restore(self, packed):
        """packed: what dump() gave. Raises CollectorError for anything else."""
        if not isinstance(packed, bytes) or len(packed) % 4 or len(packed) > 4 * MAX_KNOWN:
            raise CollectorError("learned peers: %r is not what was saved" % (packed,))
        known = self.counter.known
        known.clear()
        for at in range(0, len(packed), 4):
            known[unpack_from(">I", packed, at)[0] & 0x3FFFFFFF] = 0

    def close(self):
        """Take the hook out."""
        hooks.remove()


def _heap_free_q8():
    """Percent in Q8 of the heap that is free now."""
    mem_free = getattr(gc, "mem_free", None)
    if mem_free is None:  # CPython has no such heap
        return 0
    free = mem_free()
    whole = free + gc.mem_alloc()  # type: ignore[attr-defined]
    while whole > 40000:  # times 25600 must stay a small int
        free >>= 1
        whole >>= 1
    return free * 25600 // whole if whole else 0


def facts():
    """What the port tells of the board, for whoever asks: a dict of reset_cause, uptime_s and rssi_dbm, each only where
    the port has it."""
    told = {"uptime_s": ticks_ms() // 1000}
    try:
        import machine

        told["reset_cause"] = machine.reset_cause()
    except (ImportError, AttributeError):
        pass
    try:
        import network

        told["rssi_dbm"] = network.WLAN(network.STA_IF).status("rssi")
    except (ImportError, AttributeError, ValueError, OSError):
        pass
    return told
