"""COSE_Mac0 with HMAC 256/64, and HKDF for the keys of each direction.

Written on hashlib and hmac, not on the device's own modules, so that each checks the other. Nothing of a message is
decoded before its tag verifies.
"""

import hashlib
import hmac

from stonechat import limits
from stonechat.errors import StonechatError

MAX_MESSAGE_BYTES = limits.REPORT_BYTES
_HEAD = b"\x84\x43\xa1\x01\x04\xa0"
_INNER = bytes(byte ^ 0x36 for byte in range(256))  # RFC 2104
_OUTER = bytes(byte ^ 0x5C for byte in range(256))
_INNER_REST, _OUTER_REST = b"\x36" * 32, b"\x5c" * 32
_sha256 = hashlib.sha256
# The begin of RFC 9052's MAC_structure, up to the device id as external_aad, by the length of this id
_CONTEXTS = [b"\x84\x64MAC0\x43\xa1\x01\x04" + (bytes((0x40 + n,)) if n < 24 else bytes((0x58, n))) for n in range(256)]


class Rejected(StonechatError):
    """A message that is not taken; `reason` is one of REASONS, the counters' names. identity: (stream, sequence number)
    of an authentic report that will never be taken, None for all others."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + (": " + detail if detail else ""))
        self.reason = reason
        self.identity: tuple[bytes, int] | None = None


REASONS = ("too large", "malformed", "unknown device", "key file", "forged", "version", "stale", "conflict")


def derive(secret: bytes, label: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869), one block, with the salt "stonechat/1"."""
    inner = hmac.digest(b"stonechat/1", secret, "sha256")
    return hmac.digest(inner, label + b"\x01", "sha256")


def mac256(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256 with a key of 32 bytes: as hmac.digest(), at a quarter of its cost for messages of this size."""
    inner = _sha256(key.translate(_INNER) + _INNER_REST + message).digest()
    return _sha256(key.translate(_OUTER) + _OUTER_REST + inner).digest()


def context_of(device: str) -> bytes:
    name = device.encode()
    return _CONTEXTS[len(name)] + name


def seal(key: bytes, context: bytes, payload: bytes) -> bytes:
    size = len(payload)
    if size < 24:
        wrapped = bytes((0x40 + size,)) + payload
    elif size < 256:
        wrapped = bytes((0x58, size)) + payload
    else:
        wrapped = b"\x59" + size.to_bytes(2) + payload
    return _HEAD + wrapped + b"\x48" + mac256(key, context + wrapped)[:8]


def open_(key: bytes, context: bytes, message: bytes, max_bytes: int) -> bytes:
    if len(message) > max_bytes:
        raise Rejected("too large", f"{len(message)} bytes")
    end = len(message) - 9
    if end < 7 or message[:6] != _HEAD or message[end] != 0x48:
        raise Rejected("malformed", "not a COSE_Mac0 message with HMAC 256/64")
    if not hmac.compare_digest(mac256(key, context + message[6:end])[:8], message[end + 1 :]):
        raise Rejected("forged", "the authentication tag does not fit")
    first = message[6]
    if first == 0x58:
        start, size, least = 8, message[7], 24
    elif first < 0x58:
        start, size, least = 7, first - 0x40, 1
    else:
        start, size, least = 9, (message[7] << 8 | message[8]) if first == 0x59 else 0, 256
    if size < least or start + size != end:
        raise Rejected("malformed", "the payload is not a byte string")
    return message[start:end]


class Mac:
    """COSE_Mac0, HMAC 256/64, for the messages of one kind of one device. key: 32 bytes."""

    __slots__ = ("_key", "_context")

    def __init__(self, key: bytes, device: str) -> None:
        self._key = key
        self._context = context_of(device)

    def seal(self, payload: bytes) -> bytes:
        return seal(self._key, self._context, payload)

    def open(self, message: bytes, max_bytes: int = MAX_MESSAGE_BYTES) -> bytes:
        """The payload of an authentic message. Raises Rejected for any other."""
        return open_(self._key, self._context, message, max_bytes)


def fingerprint(secret: bytes) -> str:
    """What may be shown of a secret."""
    return hashlib.sha256(b"stonechat fingerprint" + secret).hexdigest()[:16]
