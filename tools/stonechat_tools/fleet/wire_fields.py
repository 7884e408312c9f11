"""Typed access to the fields of a message that verified: what does not fit the CDDL is refused by the field's key."""

from typing import Any

import cbor2
from stonechat import limits

from .keyring import Rejected
from .messages import OwnModel

VERSION = 1
COUNT_MAX = 0xFFFFFFFF


class Fields:
    """Typed access to a decoded map: a device that signs nonsense is refused as well."""

    __slots__ = ("all",)

    def __init__(self, payload: bytes) -> None:
        try:
            decoded = cbor2.loads(payload)
        except Exception as error:  # whatever a decoder raises on nonsense that a device has signed
            raise Rejected("malformed", str(error)) from None
        if not isinstance(decoded, dict):
            raise Rejected("malformed", "not a map")
        self.all = decoded
        if decoded.get(0) != VERSION:
            raise Rejected("version", repr(decoded.get(0))[:20])

    def __contains__(self, key: int) -> bool:
        return key in self.all

    def count(self, key: int, top: int = COUNT_MAX) -> int:
        value = self.all.get(key)
        if type(value) is not int or not 0 <= value <= top:
            raise Rejected("malformed", f"key {key}")
        return value

    def maybe(self, key: int, top: int = COUNT_MAX) -> int | None:
        return self.count(key, top) if key in self.all else None

    def own(self, key: int) -> OwnModel | None:
        value = self.all.get(key)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or len(value) != 5:
            raise Rejected("malformed", f"key {key}")
        *counts, digest = value
        if (
            any(type(item) is not int or not 0 <= item <= COUNT_MAX for item in counts)
            or counts[0] >= len(OwnModel.PHASES)
            or not isinstance(digest, bytes)
            or len(digest) > limits.DIGEST_BYTES
        ):
            raise Rejected("malformed", f"key {key}")
        phase, done, wanted, refused = counts
        return OwnModel(phase, done, wanted, refused, digest)

    def counts(self, key: int, size: int | None) -> tuple[int, ...]:
        """size: how many, or None for up to limits.CAUSES."""
        value = self.all.get(key)
        if (
            not isinstance(value, (list, tuple))
            or (len(value) > limits.CAUSES if size is None else len(value) != size)
            or any(type(item) is not int or not 0 <= item <= COUNT_MAX for item in value)
        ):
            raise Rejected("malformed", f"key {key}")
        return tuple(value)

    def text(self, key: int, most_bytes: int) -> str | None:
        value = self.all.get(key)
        if value is not None and not isinstance(value, str):
            raise Rejected("malformed", f"key {key}")
        return None if value is None else plain(value, most_bytes)

    def texts(self, key: int, most: int, most_bytes: int) -> tuple[str, ...]:
        """The first `most` of a list; empty where there is none."""
        value = self.all.get(key)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)) or any(not isinstance(item, str) for item in value):
            raise Rejected("malformed", f"key {key}")
        return tuple(plain(item, most_bytes) for item in value[:most])

    def detail(self) -> str | None:
        value = self.all.get(13)
        if value is not None and (not isinstance(value, str) or value != plain(value, limits.DETAIL_BYTES)):
            raise Rejected("malformed", "key 13")
        return value

    def octets(self, key: int, most: int) -> bytes | None:
        value = self.all.get(key)
        if value is not None and (not isinstance(value, bytes) or len(value) > most):
            raise Rejected("malformed", f"key {key}")
        return value

    def features(self) -> bytes:
        value = self.octets(10, limits.FEATURES_BYTES) or b""
        if len(value) % 3:
            raise Rejected("malformed", "features")
        return value

    def stream(self) -> bytes:
        value = self.octets(16, limits.STREAM_BYTES)
        if value is None or len(value) != limits.STREAM_BYTES:
            raise Rejected("malformed", "key 16")
        return value

    def flag(self, key: int) -> bool | None:
        value = self.all.get(key)
        if value is not None and not isinstance(value, bool):
            raise Rejected("malformed", f"key {key}")
        return value

    def raw(self, key: int) -> Any:
        return self.all.get(key)


def plain(text: str, most_bytes: int) -> str:
    """What a terminal, a page and a mail may show of a text that came over the network, cut where it is too long. A
    status is never refused for a text that its device has signed."""
    if len(text.encode()) > most_bytes:
        text = text.encode()[:most_bytes].decode(errors="ignore")
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
