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
                self._read(file)
        except OSError:
            return
        except MemoryError:
            self.damaged = "large"
        if self.damaged:
            self.sections = {}

    def _read(self, file):
        """Section by section: nothing but what is kept takes memory."""
        end = file.seek(0, 2) - 4
        file.seek(0)
        at = crc = 0
        while at < end <= MAX_BYTES - 4:
            head = file.read(3)
            name_size, size = unpack_from("<BH", head, 0)
            at += 3 + name_size + size
            if at > end:
                break
            name = file.read(name_size)
            value = file.read(size)
            crc = crc32(value, crc32(name, crc32(head, crc)))
            self.sections[name] = value
        if at != end or unpack_from("<I", file.read(4), 0)[0] != crc:
            self.damaged = "%d bytes, damaged" % (end + 4)

    def get(self, section: bytes, default=None):
        return self.sections.get(section, default)

    def put(self, section: bytes, value: bytes) -> None:
        """Hold `value` for the next save()."""
        self.sections[section] = value

    def save(self) -> None:
        """Write the record atomically. Raises StateError where the medium refuses (full, read-only)."""
        if self.path is None:
            return
        parts = []
        size = 4
        crc = 0
        for name in self.sections:
            value = self.sections[name]
            head = pack("<BH", len(name), len(value) & 0xFFFF) + name  # more is refused below
            crc = crc32(value, crc32(head, crc))
            size += len(head) + len(value)
            parts += [head, value]
        parts.append(pack("<I", crc))
        try:
            if size > MAX_BYTES:
                raise OSError("%d bytes" % size)
            write_atomic(self.path, parts)
        except OSError as error:
            raise StateError("can't write %s: %s" % (self.path, error))
