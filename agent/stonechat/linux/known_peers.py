"""The peers that a device has learned to be its own: bounded, as hashes keyed with a device secret, no addresses.

A peer becomes known after KNOWN_AFTER windows in which it was seen, not at first sight: a beacon stays new for that
long, and a scan, which never meets anybody twice, teaches nothing. While the device is under suspicion nothing is
learned (`hold`).

Only a peer that the device itself has opened a connection to becomes known as such. Whoever connects from outside may
become a known visitor, whose visits are ordinary; the day the device calls that address, it is new. Visitors are kept
apart, so that nobody outside can push a known peer out; and a known peer makes place for another one only when it has
not been seen for FORGET_AFTER windows."""

from ..compat import sha256, urandom
from ..errors import CollectorError

MAX_KNOWN = 256
MAX_VISITORS = 64
MAX_CANDIDATES = 256  # peers seen, but not often enough; a spray pushes candidates out, never known ones
KNOWN_AFTER = 12  # windows
FORGET_AFTER = 8640  # windows: half a day of 5 s
_KEY_BYTES = 8
_CONTACT = 0x3FFFFFFF  # a small int on every board
_END = bytes(_KEY_BYTES)  # in the saved form: visitors follow


def peers_key(secret: "bytes | None") -> bytes:
    """What keys the hashes of peers. secret: bytes of this device; None: random, for this process."""
    return sha256(b"stonechat peers" + (secret or urandom(32))).digest()


class LearnedPeers:
    """secret: 32 bytes of this device."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._known: dict = {}  # key: window in which it was seen last, the longest unseen first
        self._visitors: dict = {}  # the same
        self._candidates: dict = {}  # key: windows seen so far, the longest unseen first
        self._visiting: dict = {}  # the same, of those who may become visitors
        self._window = 0
        self.hold = False  # True: nobody becomes known
        self.forgotten = 0  # known peers that were dropped for others
        self.contacts: list = []  # of this window, for lasting_peers.py: whom this device wrote to on its own account

    def __len__(self) -> int:
        return len(self._known)

    def next_window(self) -> None:
        self._window += 1
        self.contacts = []

    def is_new(self, address: bytes, opened: bool = True) -> bool:
        """One peer of one window, once; opened: by this device, else from outside -> True while it is not known. Counts
        the sighting unless `hold`."""
        key = sha256(self._secret + address).digest()[:_KEY_BYTES]
        if opened:
            self.contacts.append(int.from_bytes(key[:4], "big") & _CONTACT)
        if key in self._known:
            del self._known[key]  # to the end: seen just now
            self._known[key] = self._window
            return False
        if opened:
            if not self.hold and _sighted(self._candidates, key):
                self._learn(key)
            return True
        if key in self._visitors:
            del self._visitors[key]
            self._visitors[key] = self._window
            return False
        if not self.hold and _sighted(self._visiting, key):
            if len(self._visitors) >= MAX_VISITORS:
                del self._visitors[next(iter(self._visitors))]
            self._visitors[key] = self._window
        return True

    def dump(self) -> bytes:
        """The known peers, eight bytes each, then eight zeros and the visitors, for the state file."""
        known = b"".join(self._known)
        return known + _END + b"".join(self._visitors) if self._visitors else known

    def restore(self, packed: bytes) -> None:
        """Raises CollectorError for anything but what dump() gave."""
        most = (MAX_KNOWN + 1 + MAX_VISITORS) * _KEY_BYTES
        if not isinstance(packed, bytes) or len(packed) % _KEY_BYTES or len(packed) > most:
            raise CollectorError("learned peers: the saved record is damaged")
        keys = [packed[i : i + _KEY_BYTES] for i in range(0, len(packed), _KEY_BYTES)]
        end = keys.index(_END) if _END in keys else len(keys)
        if end > MAX_KNOWN or len(keys) - end - 1 > MAX_VISITORS:
            raise CollectorError("learned peers: the saved record is damaged: %d of them" % len(keys))
        self._known = dict.fromkeys(keys[:end], 0)
        self._visitors = dict.fromkeys(keys[end + 1 :], 0)
        self._candidates = {}
        self._visiting = {}

    def _learn(self, key: bytes) -> None:
        if len(self._known) >= MAX_KNOWN:
            oldest = next(iter(self._known))
            if self._window - self._known[oldest] < FORGET_AFTER:
                return  # those in use are kept; the newcomer stays new
            del self._known[oldest]
            self.forgotten += 1
        self._known[key] = self._window


def _sighted(candidates: dict, key: bytes) -> bool:
    """Count a sighting -> True where it was the last one needed."""
    windows = candidates.pop(key, 0) + 1
    if windows >= KNOWN_AFTER:
        return True
    if len(candidates) >= MAX_CANDIDATES:
        del candidates[next(iter(candidates))]
    candidates[key] = windows
    return False
