"""COSE_Mac0 (RFC 9052 section 6.2) with HMAC 256/64, and the keys that a device derives from its secret.

A sealed message is the untagged array [h'a10104', {}, payload, tag]: 17 bytes around a payload of 24 to 255. The device
id is the external data, so a message moved to another device's topic does not verify; each kind of message has a key of
its own (HKDF-SHA256, RFC 5869), so a report moved to the status topic does not either.
"""

from . import cbor
from .compat import const, sha256
from .errors import WireError

SECRET_BYTES = const(32)
_TAG_BYTES = const(8)
_HEAD = b"\x84\x43\xa1\x01\x04\xa0"
_CONTEXT = b"\x84\x64MAC0\x43\xa1\x01\x04"
_SALT = b"stonechat/1"

# Labels of the keys; "peers" keys the hashes of learned peers and never leaves the device.
REPORT = b"report"
STATUS = b"status"
ACK = b"ack"
COMMAND = b"command"
PEERS = b"peers"


def _pads(key: bytes) -> tuple:
    if len(key) > 64:
        key = sha256(key).digest()
    key = key + bytes(64 - len(key))
    return bytes([b ^ 0x36 for b in key]), bytes([b ^ 0x5C for b in key])


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """RFC 2104 over SHA-256: 32 bytes."""
    inner, outer = _pads(key)
    return sha256(outer + sha256(inner + message).digest()).digest()


def derive(secret: bytes, label: bytes) -> bytes:
    """The 32-byte key of `label`: HKDF-SHA256 with the salt "stonechat/1". Raises WireError unless `secret` has 32
    bytes."""
    if len(secret) != SECRET_BYTES:
        raise WireError("secret: %d bytes, want %d" % (len(secret), SECRET_BYTES))
    return hmac_sha256(hmac_sha256(_SALT, secret), label + b"\x01")


class Mac:
    """Seals and opens the messages of one kind of one device."""

    def __init__(self, key: bytes, device_id: str) -> None:
        self._inner, self._outer = _pads(key)
        context = bytearray(_CONTEXT)
        cbor.encode(device_id.encode(), context)
        self._context = bytes(context)

    def _tag(self, head: bytes | bytearray, payload: bytes | bytearray) -> bytes:
        inner = sha256(self._inner)
        inner.update(self._context)
        inner.update(head)
        inner.update(payload)
        outer = sha256(self._outer)
        outer.update(inner.digest())
        return outer.digest()[:_TAG_BYTES]

    def seal(self, payload: bytes | bytearray) -> bytes:
        """payload: deterministic CBOR -> the COSE_Mac0 message."""
        head = bytearray()
        cbor.head(head, 2, len(payload))
        return b"".join((_HEAD, head, payload, b"\x48", self._tag(head, payload)))

    def open(self, message: bytes) -> bytes:
        """The payload of a message that this key has sealed. Raises WireError for any other."""
        end = len(message) - _TAG_BYTES - 1
        wrapped = bytes(message[6 : max(6, end)])
        difference = int(bytes(message[:6]) != _HEAD or end < 7 or message[end] != 0x48)
        for want, got in zip(self._tag(b"", wrapped), message[-_TAG_BYTES:]):
            difference |= want ^ got  # all eight, always: the time taken tells nothing
        payload = None if difference else cbor.loads(wrapped)
        if not isinstance(payload, bytes):
            raise WireError("not sealed with this key")
        return payload
