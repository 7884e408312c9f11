"""COSE_Mac0 (RFC 9052 section 6.2) with HMAC 256/64, and the keys that a device derives from its secret: sealing.

A sealed message is the untagged array [h'a10104', {}, payload, tag]: 17 bytes around a payload of 24 to 255. The device
id is the external data, so a message moved to another device's topic does not verify; each kind of message has a key of
its own (HKDF-SHA256, RFC 5869), so a report moved to the status topic does not either. delivery.py opens what comes
back. Labels of keys: b"report", b"status", b"ack", b"command", and of updates b"offer", b"want"; b"peers" keys the
hashes of learned peers.
"""

from . import cbor
from .compat import const, sha256
from .errors import WireError

TAG_BYTES = const(8)
HEAD = b"\x84\x43\xa1\x01\x04\xa0"


def _pad(key, byte):
    return bytes([b ^ byte for b in key + bytes(64 - len(key))])


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """RFC 2104 over SHA-256: 32 bytes. key: at most 64 bytes, as all are here."""
    return sha256(_pad(key, 0x5C) + sha256(_pad(key, 0x36) + message).digest()).digest()


def derive(secret: bytes, label: bytes) -> bytes:
    """The 32-byte key of `label`: HKDF-SHA256 with the salt "stonechat/1". Raises WireError unless `secret` has 32
    bytes."""
    if len(secret) != 32:
        raise WireError("secret: %d bytes, not 32" % len(secret))
    return hmac_sha256(hmac_sha256(b"stonechat/1", secret), label + b"\x01")


class Mac:
    """Seals the messages of one kind (label) of one device."""

    def __init__(self, secret: bytes, label: bytes, device_id: str) -> None:
        key = derive(secret, label)
        context = bytearray(_pad(key, 0x36) + b"\x84\x64MAC0\x43\xa1\x01\x04")
        cbor.encode(device_id.encode(), context)
        self._inner = context
        self._outer = _pad(key, 0x5C)

    def tag(self, start, value=b"") -> bytes:
        """start, value: the payload as a CBOR byte string, in two pieces -> TAG_BYTES bytes."""
        digest = sha256(self._inner)
        digest.update(start)
        digest.update(value)
        outer = sha256(self._outer)
        outer.update(digest.digest())
        return outer.digest()[:TAG_BYTES]

    def seal(self, value) -> bytearray:
        """value: the payload, deterministic CBOR -> the COSE_Mac0 message."""
        out = bytearray(HEAD)
        cbor.head(out, 2, len(value))
        tag = self.tag(out[6:], value)  # first: what is allocated meanwhile would be in the way of `out`
        out.extend(value)
        out.append(0x48)
        out.extend(tag)
        return out
