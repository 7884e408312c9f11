"""What the device has learned, as one atomic record: it survives a restart, a power cut and a full disk.

The record is a CBOR map of sections, each under a text key of its own: "norm:" and "peers:" + schema id, "cal:" + model
digest, "device" (sequence, boot, firmware). A CRC guards it; a record that can't be read is set aside as PATH.bad and
the device starts afresh, saying so.
"""

from binascii import crc32

from . import cbor
from .compat import const, replace, write_atomic
from .errors import StateError, WireError

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
        try:
            self.sections = _unseal(raw)
            self.fresh = False
        except (StateError, WireError) as error:
            self.damaged = str(error)
            try:
                replace(path, path + ".bad")
            except OSError:
                pass

    def get(self, section: str, default=None):
        return self.sections.get(section, default)

    def put(self, section: str, value) -> None:
        """Hold `value` (anything that cbor.dumps takes) for the next save()."""
        self.sections[section] = value

    def drop(self, section: str) -> None:
        self.sections.pop(section, None)

    def save(self) -> None:
        """Write the record atomically. Raises StateError where the medium refuses (full, read-only)."""
        if self.path is None:
            return
        body = cbor.dumps(self.sections)
        if len(body) > MAX_BYTES - 4:
            raise StateError("state: %d bytes, at most %d" % (len(body), MAX_BYTES - 4))
        crc = crc32(body) & 0xFFFFFFFF
        try:
            write_atomic(self.path, body + bytes((crc >> 24, crc >> 16 & 255, crc >> 8 & 255, crc & 255)))
        except OSError as error:
            raise StateError("state: can't write %s: %s" % (self.path, error))


def _unseal(raw: bytes) -> dict:
    if len(raw) < 5 or len(raw) > MAX_BYTES:
        raise StateError("state: %d bytes" % len(raw))
    body = raw[:-4]
    stored = raw[-4] << 24 | raw[-3] << 16 | raw[-2] << 8 | raw[-1]
    if crc32(body) & 0xFFFFFFFF != stored:
        raise StateError("state: its checksum does not hold")
    sections = cbor.loads(body)
    if not isinstance(sections, dict):
        raise StateError("state: not a map")
    return sections
