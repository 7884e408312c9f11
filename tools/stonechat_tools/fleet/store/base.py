"""What all modules of the database share: its errors, its rows, and what it needs of an engine."""

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from stonechat.errors import StonechatError

from ..wire import Feature

STORED, DUPLICATE, CONFLICT = "stored", "duplicate", "conflict"
DAY_S = 86_400
MAX_CACHED = 10_000
MOST_AHEAD_S = 400 * DAY_S  # from one number to the next
HIGHEST_NUMBER = 0xF0000000  # by the clock; what is left are some hundred million of the 32 bits
MAX_IN = 500  # values in one IN (...)


class StoreError(StonechatError):
    """The database can't be opened, read or written. passes: it may work later without anybody's doing here. held: it
    is held by another collector, perhaps one that is dead, which the server has not noticed yet."""

    def __init__(self, text: str, passes: bool = False, held: bool = False) -> None:
        super().__init__(text)
        self.passes = passes
        self.held = held


@dataclass(frozen=True, slots=True)
class Row:
    """One report out of the database; `time_s` is that of the event where it is known, else when it was received.
    `variant` is 0, or another number for a report whose name another one had taken before."""

    device: str
    stream: str
    sequence: int
    variant: int
    boot: int
    time_s: float
    time_known: bool
    late_s: int | None
    level: int
    flags: int
    windows: int
    score: float | None
    score_min: float | None
    score_max: float | None
    surprise: float | None
    evidence: float | None
    features: list[Feature]
    detail: str | None
    lost: int
    channel: int = 0


class Stream:
    """One start of a device. highest: of its sequence numbers, -1 for none."""

    __slots__ = ("id", "highest", "forgotten", "began_s", "behind_s")

    def __init__(self, row: int, highest: int, forgotten: int, began_s: int | None, behind_s: int | None) -> None:
        self.id = row
        self.highest = highest
        self.forgotten = forgotten
        self.began_s = began_s
        self.behind_s = behind_s


_KEPT = ("id", "key", "newest_s", "heartbeat", "name", "stream")
_CHANGED = ("reports", "conflicts", "refused", "reset", "newest")


class Device:
    """What is remembered of a device between batches, and what the batch at hand changes of it. name: of its current
    stream, `stream`."""

    __slots__ = (*_KEPT, *_CHANGED)

    def __init__(self, row: int, key: str, newest_s: int | None, heartbeat: int) -> None:
        self.id = row
        self.key = key
        self.newest_s = newest_s
        self.heartbeat = heartbeat
        self.name = b""
        self.stream: Stream | None = None
        self.begin()

    def begin(self) -> None:
        """A batch begins: nothing of it is known yet."""
        self.reports = self.conflicts = self.refused = 0
        self.reset = False
        self.newest: tuple[Any, ...] | None = None  # of its reports, if it is the device's newest

    def pack(self) -> bytes:
        """As it is kept between batches, in a quarter of the memory."""
        stream = self.stream or _NO_STREAM
        newest_s, began_s, behind_s = self.newest_s, stream.began_s, stream.behind_s
        return (
            _PACKED.pack(
                len(self.name),
                self.id,
                _NONE if newest_s is None else newest_s,
                self.heartbeat,
                stream.id,
                stream.highest,
                stream.forgotten,
                _NONE if began_s is None else began_s,
                _NONE if behind_s is None else behind_s,
            )
            + self.name
            + self.key.encode()
        )

    @classmethod
    def unpack(cls, packed: bytes) -> "Device":
        size, row, newest_s, heartbeat, stream, highest, forgotten, began_s, behind_s = _unpack(packed)
        end = _HEAD_BYTES + size
        made = cls.__new__(cls)
        made.id, made.heartbeat, made.key = row, heartbeat, packed[end:].decode()
        made.newest_s = None if newest_s == _NONE else newest_s
        made.reports = made.conflicts = made.refused = 0
        made.reset, made.newest = False, None
        if stream == -1:
            made.name, made.stream = b"", None
            return made
        made.name = packed[_HEAD_BYTES:end]
        one = made.stream = Stream.__new__(Stream)
        one.id, one.highest, one.forgotten = stream, highest, forgotten
        one.began_s = None if began_s == _NONE else began_s
        one.behind_s = None if behind_s == _NONE else behind_s
        return made


_PACKED = struct.Struct("<B8q")
_HEAD_BYTES = _PACKED.size
_unpack = _PACKED.unpack_from
_NONE = -(1 << 63)
_NO_STREAM = Stream(-1, -1, -1, None, None)
_STREAM_AT = 1 + 3 * 8


def packed_stream(packed: bytes) -> int:
    """The row of the current stream of a packed device, -1 for none."""
    return int.from_bytes(packed[_STREAM_AT : _STREAM_AT + 8], "little", signed=True)


class Db(Protocol):
    """An open transaction. Queries have `?` for each value, in both engines."""

    def execute(self, query: str, values: Sequence[Any] = ..., /) -> Any: ...

    def executemany(self, query: str, rows: Iterable[Sequence[Any]], /) -> Any: ...


class Engine(Protocol):
    """generation: grows with each database that is opened, so that what was remembered of another one is dropped."""

    generation: int
    integer: str  # what the schema's types are called here
    real: str
    blob: str
    key: str

    @property
    def name(self) -> str:
        """For messages: a path, or a URL without its password."""

    def transaction(self) -> AbstractContextManager[Db]: ...

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]: ...

    def append(self, db: Db, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...

    def collecting(self) -> AbstractContextManager[None]: ...

    def close(self) -> None: ...


def number(q8: int | None) -> float | None:
    return None if q8 is None else q8 / 256


def next_number(last: int, now_s: float) -> int:
    """The number after `last` of what a device takes only in rising order: the clock's seconds, so that a database
    restored from a backup goes on above what was used since; one more, where the clock is behind or so far ahead that
    it must be wrong: what follows it then is refused once the clock is right. last: 0 for none yet."""
    clock_s = int(now_s)
    rises = 0 < clock_s - last <= MOST_AHEAD_S or not last and 0 < clock_s <= HIGHEST_NUMBER
    return clock_s if rises else last + 1


def pieces(values: Sequence[Any], size: int = MAX_IN) -> Iterator[Sequence[Any]]:
    for at in range(0, len(values), size):
        yield values[at : at + size]


def marks(count: int) -> str:
    return ",".join("?" * count)
