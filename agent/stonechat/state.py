"""What the device has learned, as one atomic record: it survives a restart, a power cut and a full disk.

The record is a run of sections, each '<BH' length of its name, length of its value, then both; a CRC-32 ends it. Names
are bytes: b"norm", b"cal" and b"peers" + schema id, b"device", b"firmware", b"command".
"""

import os
from binascii import crc32
from struct import pack, unpack_from

from .compat import const, write_atomic
from .errors import StateError

MAX_BYTES = const(32768)


def open_state(folder: str) -> "State":
    """The state in `folder`, which is made where it is missing."""
    try:
        os.mkdir(folder)
    except OSError:
        pass  # it is there, or save() says what is wrong
    return State(folder + "/state")


class State:
    """path: the file; None keeps everything in memory. A record that can't be read is as good as none: `damaged` then
    says so, None otherwise. The next save() writes over it."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.sections: dict = {}
        self.damaged: str | None = None
        if path is None:
            return
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)  # MicroPython takes the RAM for all that read() is asked for
                file.seek(0)
                raw = file.read(min(size, MAX_BYTES + 1))
        except OSError:
            return
        end = len(raw) - 4
        if not 0 <= end <= MAX_BYTES - 4 or crc32(raw[:end]) != unpack_from("<I", raw, end)[0]:
            self.damaged = "%d bytes, damaged" % len(raw)
            return
        at = 0
        while at < end:  # the checksum behind it keeps unpack_from inside the record
            size, value_size = unpack_from("<BH", raw, at)
            at += 3 + size
            self.sections[raw[at - size : at]] = raw[at : at + value_size]
            at += value_size

    def get(self, section: bytes, default=None):
        return self.sections.get(section, default)

    def put(self, section: bytes, value: bytes) -> None:
        """Hold `value` for the next save()."""
        self.sections[section] = value

    def save(self) -> None:
        """Write the record atomically. Raises StateError where the medium refuses (full, read-only)."""
        if self.path is None:
            return
        record = bytearray()
        for name in self.sections:
            value = self.sections[name]
            record.extend(pack("<BH", len(name), len(value) & 0xFFFF) + name + value)  # more is refused below
        record.extend(pack("<I", crc32(record)))
        try:
            if len(record) > MAX_BYTES:
                raise OSError("%d bytes" % len(record))
            write_atomic(self.path, record)
        except OSError as error:
            raise StateError("can't write %s: %s" % (self.path, error))
