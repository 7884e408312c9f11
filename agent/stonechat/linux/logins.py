"""Failed logins: how much /var/log/btmp grows, one record of 384 bytes an attempt (struct utmp, utmp(5)).

Only its size is looked at, which needs no right to read it; the names in it stay where they are. Before logrotate
renames it away, an O_PATH descriptor holds the old file, so that what was added last still counts.
"""

import os

RECORD_BYTES = 384
PATH = "/var/log/btmp"


class FailedLogins:
    """read() -> failed attempts since the start, cumulative. A file that is not there counts none until it appears."""

    group = "logins"
    source = PATH

    def __init__(self, path: str = PATH) -> None:
        self._path = path
        self._fd = -1
        self._seen_bytes = 0
        self._total = 0
        self._open()
        if self._fd >= 0:
            self._seen_bytes = os.fstat(self._fd).st_size  # what is there already is history

    @property
    def note(self) -> str:
        return "counts records" if self._fd >= 0 else "%s is not there; nothing on this machine writes it" % self._path

    def read(self) -> int:
        self._grow()
        if self._rotated():
            self.close()
            self._seen_bytes = 0
            self._open()
            self._grow()
        return self._total

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        try:
            self._fd = os.open(self._path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def _grow(self) -> None:
        if self._fd < 0:
            return
        size = os.fstat(self._fd).st_size
        if size < self._seen_bytes:
            self._seen_bytes = 0  # truncated in place (copytruncate)
        records = (size - self._seen_bytes) // RECORD_BYTES
        self._seen_bytes += records * RECORD_BYTES
        self._total += records

    def _rotated(self) -> bool:
        try:
            there = os.stat(self._path)
        except OSError:
            return False  # between rename and create: the old file still counts
        return self._fd < 0 or there.st_ino != os.fstat(self._fd).st_ino
