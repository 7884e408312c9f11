"""The outbox on a medium that may be full, read-only or missing, even at the start: it waits for it to heal."""

import os
import stat

from ..compat import ticks_add, ticks_diff, ticks_ms
from ..errors import OutboxError
from ..outbox import Outbox

AGAIN_MS = 10_000
_DIGITS = frozenset("0123456789abcdef")
_LAST = "f0000000.seg"  # a number that no ring reaches; behind it there must be numbers left


class DiskOutbox(Outbox):
    """Never raises at the start: append() then raises OutboxError, as it does for a full disk, and tries to open the
    folder again every AGAIN_MS. `trouble`: why nothing is being written; "" while all is well."""

    trouble = ""
    _opened = False
    _due_ms = 0

    def _open(self) -> None:
        self._due_ms = ticks_add(ticks_ms(), AGAIN_MS)
        try:
            self.boot = 0
            self._segments = []
            self._cached = 0
            Outbox._open(self)
            self._opened = True
            self.trouble = ""
        except OSError as error:
            self._segments = []
            self.trouble = "can't write to %s: %s" % (self.path, error.strerror or error)

    def _names(self) -> list:
        """Only what this program wrote: whatever else lies in the folder is left alone."""
        names = []
        for name in os.listdir(self.path):
            ours = len(name) == 12 and name.endswith(".seg") and not set(name[:8]) - _DIGITS and name < _LAST
            if ours and stat.S_ISREG(os.lstat(self.path + "/" + name).st_mode):
                names.append(name)
        return sorted(names)

    def _next_number(self) -> int:
        number = Outbox._next_number(self)
        while os.path.lexists(self._name(number)):  # somebody else's
            number += 1
        return number

    def append(self, body) -> int:
        if not self._opened:
            if ticks_diff(ticks_ms(), self._due_ms) >= 0:
                self._open()
            if not self._opened:
                self.sequence += 1  # the number is used up: the report may go out under it from memory
                raise OutboxError(self.trouble)
        try:
            sequence = Outbox.append(self, body)
        except OutboxError as error:
            self.trouble = str(error).removeprefix("outbox: ")
            raise
        self.trouble = ""
        return sequence

    def save(self) -> None:
        if self._opened:
            Outbox.save(self)
