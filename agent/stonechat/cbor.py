"""Deterministic CBOR (RFC 8949 section 4.2.1), as much of it as a device sends: ints from 0 to 2^64 - 1, bools, bytes,
texts, sequences, and maps whose keys are small ints. cbor_decode.py is the way back.
"""

from struct import pack


def head(out: bytearray, major: int, n: int) -> None:
    """Append the first bytes of an item: its major type and its value or length."""
    major <<= 5
    if n < 24:
        out.append(major | n)
    elif n < 0x10000:  # needs no pack(), which makes a bytes
        if n < 0x100:
            out.append(major | 24)
        else:
            out.append(major | 25)
            out.append(n >> 8)
        out.append(n & 255)
    else:
        wide = n > 0xFFFFFFFF
        out.append(major | 26 + wide)
        out.extend(pack(">Q" if wide else ">I", n))


def encode(value, out: bytearray) -> None:
    """Append `value` to `out`; the module's docstring says what it may be. Raises TypeError for most of the rest."""
    major = 4
    if value is True or value is False:
        out.append(0xF4 + value)
    elif isinstance(value, int):
        head(out, 0, value)
    else:
        if isinstance(value, str):
            value = value.encode()
            major = 3
        elif not isinstance(value, (list, tuple)):
            major = 2
        head(out, major, len(value))
        if major < 4:
            out.extend(value)
        else:
            for item in value:
                encode(item, out)


def encode_fields(fields: list, out: bytearray) -> None:
    """fields: values whose index is their key, None is absent -> appends the map, without a dict or a sort."""
    head(out, 5, len(fields) - fields.count(None))
    for key in range(len(fields)):  # noqa: PLC0200 - enumerate() would allocate a tuple for each
        value = fields[key]
        if value is not None:
            if key < 24:
                out.append(key)
            else:
                head(out, 0, key)
            if type(value) is not int:
                encode(value, out)
            elif value < 24:  # most are: a call less
                out.append(value)
            else:
                head(out, 0, value)
