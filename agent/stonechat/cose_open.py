"""Opens what the collector sends to the device: a COSE_Mac0 message (cose.py) is verified before it is decoded."""

from .cbor_decode import loads
from .compat import const
from .cose import HEAD, TAG_BYTES
from .errors import WireError

_WIRE_VERSION = const(1)


def unseal(mac, message):
    """The payload of a message that `mac` (cose.Mac) has sealed. Raises WireError for any other."""
    end = len(message) - TAG_BYTES - 1
    wrapped = bytes(message[6 : max(6, end)])
    difference = bytes(message[:6]) != HEAD or end < 7 or message[end] != 0x48
    for want, got in zip(mac.tag(wrapped), message[-TAG_BYTES:]):
        difference |= want ^ got  # all eight, always, so that the time it takes reveals nothing
    value = None if difference else loads(wrapped)
    if not isinstance(value, bytes):
        raise WireError("not sealed with this key")
    return value


def fields_of(mac, message) -> dict:
    """The map in a message that `mac` has sealed. Raises WireError for any other, or another version of the wire."""
    fields = loads(unseal(mac, message))
    if not isinstance(fields, dict) or fields.get(0) != _WIRE_VERSION:
        raise WireError
    return fields


def is_count(value) -> bool:
    return isinstance(value, int) and value is not True and value is not False and 0 <= value <= 0xFFFFFFFF
