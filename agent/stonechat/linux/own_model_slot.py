"""Where a device keeps its own model, or the windows that it collects for it: one file, mode 0600, sealed with a key
that only this device has and bound to the reference model, schema and firmware that it was made under.

What is damaged, tampered with, of another device or of another reference model is refused, and made again. Content:
the mark, what it is bound to (24 bytes), what own_model.py keeps, and an HMAC-SHA256 of all of it.
"""

import os
from stat import S_IMODE

from ..compat import sha256, write_atomic
from ..cose import derive, hmac_sha256
from ..errors import ConfigError, StateError
from . import files

_MARK = b"SCO1"
_BOUND_BYTES = 24
_TAG_BYTES = 32
MAX_BYTES = 4 << 20


class Slot:
    """path: the file; key: the device's secret of 32 bytes; reference: digest of the reference model; schema_id;
    firmware: its id. say(text) takes a warning."""

    def __init__(self, path: str, key: bytes, reference: bytes, schema_id: bytes, firmware: str, say) -> None:
        self._path = path
        self._head = _MARK + reference + schema_id + sha256(firmware.encode()).digest()[:8]
        self._say = say
        self._content = b""
        self._key = derive(key, b"own-model")

    def load(self) -> bytes:
        """-> what save() was given last, empty where there is nothing that can be trusted; that is removed."""
        if not os.path.lexists(self._path):
            return b""
        why = ""
        data = b""
        try:
            data, mode = files.read_regular(self._path, MAX_BYTES + 1, "own model")
            if S_IMODE(mode) & 0o077:
                why = "it is open to others (mode %03o)" % S_IMODE(mode)
        except ConfigError as error:
            why = str(error)
        head = len(self._head)
        if not why and (
            len(data) < head + _TAG_BYTES
            or len(data) > MAX_BYTES
            or self._tag(data[:-_TAG_BYTES]) != data[-_TAG_BYTES:]
        ):
            why = "it is damaged, or not of this device"
        if why:
            self._say("own model: %s refused, because %s; made again" % (self._path, why))
        elif data[:head] == self._head:
            self._content = data[head:-_TAG_BYTES]
            return self._content
        else:
            self._say("own model: of another reference model, schema or firmware; made again")
        self._remove()
        return b""

    def save(self, content: bytes) -> None:
        """Written where it has changed. Raises StateError where the medium refuses."""
        if content == self._content and os.path.lexists(self._path):
            return
        body = self._head + content
        try:
            write_atomic(self._path, (body, self._tag(body)))
        except OSError as error:
            raise StateError("can't write %s: %s" % (self._path, error))
        self._content = content

    def bind(self, reference: bytes) -> None:
        """Another reference model is final."""
        head = _MARK + reference + self._head[len(_MARK) + len(reference) :]
        if head != self._head:
            self._head = head
            self._content = b""  # the next save() writes it

    def use_key(self, key: bytes) -> None:
        """The device has another key: seal it with that."""
        self._key = derive(key, b"own-model")
        if self._content:
            content, self._content = self._content, b""
            try:
                self.save(content)
            except StateError as error:
                self._say("own model: " + str(error))

    def _tag(self, body) -> bytes:
        return hmac_sha256(self._key, body)

    def _remove(self) -> None:
        try:
            os.unlink(self._path)
        except OSError:
            pass  # save() writes over it, or says why it can't
