"""What the device has learned, as one atomic record: it survives a restart, a power cut and a full disk.

The record is a run of sections, each '<BH' length of its name, length of its value, then both; a CRC-32 ends it. Names
are bytes: b"norm" and b"peers" + schema id, b"cal" + model digest, b"device", b"firmware", b"command". A record that
can't be read is set aside as PATH.bad and the device starts afresh, saying so.
"""

from binascii import crc32
from struct import pack, unpack_from

from .compat import const, replace, write_atomic
from .errors import StateError

MAX_BYTES = const(32768)


class State:
    """path: the file; None keeps everything in memory. `fresh` tells that nothing could be restored, `damaged` why."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.sections: dict = {}
        self.fresh = True
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
            self.damaged = "state: %d bytes, damaged" % len(raw)
            try:
                replace(path, path + ".bad")
            except OSError:
                pass
            return
        at = 0
        while at < end:  # the checksum behind it keeps unpack_from inside the record
            name_bytes, value_bytes = unpack_from("<BH", raw, at)
            at += 3 + name_bytes
            self.sections[raw[at - name_bytes : at]] = raw[at : at + value_bytes]
            at += value_bytes
        self.fresh = False

    def get(self, section: bytes, default=None):
        return self.sections.get(section, default)

    def put(self, section: bytes, value: bytes) -> None:
        """Hold `value` for the next save()."""
        self.sections[section] = value

    def drop(self, section: bytes) -> None:
        self.sections.pop(section, None)

    def save(self) -> None:
        """Write the record atomically. Raises StateError where the medium refuses (full, read-only)."""
        if self.path is None:
            return
        record = bytearray()
        for name in self.sections:
            value = self.sections[name]
            record.extend(pack("<BH", len(name), len(value)))
            record.extend(name)
            record.extend(value)
        record.extend(pack("<I", crc32(record)))
        try:
            if len(record) > MAX_BYTES:
                raise OSError("%d bytes" % len(record))
            write_atomic(self.path, record)
        except OSError as error:
            raise StateError("state: can't write %s: %s" % (self.path, error))
