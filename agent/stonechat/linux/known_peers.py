"""The peers that a device has learned to be its own: bounded, as hashes keyed with a device secret, no addresses.

A peer becomes known after KNOWN_AFTER windows in which it was seen, not at first sight: a beacon stays new for that
long, and a scan, which never meets anybody twice, teaches nothing. While the device is under suspicion nothing is
learned (`hold`)."""

from ..compat import sha256
from ..errors import CollectorError

MAX_KNOWN = 256
MAX_CANDIDATES = 256  # peers seen, but not often enough; a spray pushes candidates out, never known ones
KNOWN_AFTER = 12  # windows
_KEY_BYTES = 8


class LearnedPeers:
    """secret: 32 bytes of this device."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._known: dict = {}  # key: None, the longest unseen first
        self._candidates: dict = {}  # key: windows seen so far, the longest unseen first
        self.hold = False  # True: nobody becomes known
        self.forgotten = 0  # known peers that were dropped for others

    def __len__(self) -> int:
        return len(self._known)

    def is_new(self, address: bytes) -> bool:
        """One peer of one window, once: -> True while it is not known. Counts the sighting unless `hold`."""
        key = sha256(self._secret + address).digest()[:_KEY_BYTES]
        if key in self._known:
            del self._known[key]  # to the end: seen just now
            self._known[key] = None
            return False
        if not self.hold:
            self._sighted(key)
        return True

    def dump(self) -> bytes:
        """The known peers, eight bytes each, for the state file."""
        return b"".join(self._known)

    def restore(self, packed: bytes) -> None:
        """Raises CollectorError for anything but what dump() gave."""
        if not isinstance(packed, bytes) or len(packed) % _KEY_BYTES or len(packed) > MAX_KNOWN * _KEY_BYTES:
            raise CollectorError("learned peers: what was saved is damaged: %r" % (packed,))
        self._known = {packed[i : i + _KEY_BYTES]: None for i in range(0, len(packed), _KEY_BYTES)}
        self._candidates = {}

    def _sighted(self, key: bytes) -> None:
        windows = self._candidates.pop(key, 0) + 1
        if windows < KNOWN_AFTER:
            if len(self._candidates) >= MAX_CANDIDATES:
                del self._candidates[next(iter(self._candidates))]
            self._candidates[key] = windows
            return
        if len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
            self.forgotten += 1
        self._known[key] = None
