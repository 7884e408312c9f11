"""Reading counters from files of the kernel: what proc.py, disks.py and cgroup.py share.

Files are opened once and read with pread: opening costs two to six times the read.
"""

import os

from ..errors import CollectorError

_CHUNK_BYTES = 32768
_MAX_FILE_BYTES = 1 << 20


class Growth:
    """Sums what the counters of one source have grown by. `totals` only ever grow.

    A counter that falls from the upper half of 32 bits to the lower half wrapped. Two of one source that fall together
    did not wrap but started again, as does one that fell any other way: that reading only primes."""

    def __init__(self, n: int) -> None:
        self._last: list[int] = []
        self.deltas = [0] * n
        self.totals = [0] * n

    def push(self, values: list[int]) -> None:
        last = self._last or values
        self._last = values
        fallen = sum(map(int.__lt__, values, last))
        deltas = self.deltas
        for i, value in enumerate(values):
            delta = value - last[i]
            if fallen:
                delta = _wrapped(value, last[i]) if fallen == 1 else 0
            deltas[i] = delta
            self.totals[i] += delta


def _wrapped(value: int, last: int) -> int:
    if value >= last:
        return value - last
    if 1 << 31 <= last < 1 << 32 and value < 1 << 31:
        return value - last + (1 << 32)
    return 0


class ProcFile:
    """One file, opened once. `read()` -> its whole text now; raises OSError."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> bytes:
        text = os.pread(self._fd, _CHUNK_BYTES, 0)
        chunk = text
        # The kernel hands out tables about a page at a time; less than half a page was the last one.
        while len(chunk) >= 2048 and len(text) < _MAX_FILE_BYTES:
            chunk = os.pread(self._fd, _CHUNK_BYTES, len(text))
            text += chunk
        return text

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    __del__ = close  # a part that fails to start leaves nothing open


class Part:
    """One source: `group` names its columns, `source` where they come from, `fix` what to do where it fails, `note`
    what to know about it here, `better` how to get a cheaper source. Opening raises OSError; so does `fill`, besides
    CollectorError, ValueError, KeyError and IndexError for a text that is not as expected."""

    group = ""
    source = ""
    fix = "mount /proc whole (systemd: no ProcSubset=pid)"
    note = ""
    better = ""
    lacks = ""

    def __init__(self, proc: str) -> None:
        self._file = ProcFile(proc + self.source[len("/proc") :])

    def fill(self, values: list[int], at: int) -> None:
        """Put this source's figures into values[at:]."""
        raise NotImplementedError

    def close(self) -> None:
        self._file.close()


def open_if_there(path: str) -> "ProcFile | None":
    try:
        return ProcFile(path)
    except OSError:
        return None


def keyed(file: ProcFile, keys: "tuple[bytes, ...]") -> list[int]:
    text = file.read()
    return [number(text, key, file.path) for key in keys]


def number(text: bytes, key: bytes, path: str) -> int:
    """The number that follows `key` where it begins a line."""
    start = 0 if text.startswith(key) else text.find(b"\n" + key) + 1
    if not start and not text.startswith(key):
        raise CollectorError("%s has no %s" % (path, key.decode().strip()))
    end = text.find(b"\n", start)
    return int(text[start + len(key) : end if end >= 0 else len(text)].split(None, 1)[0])
