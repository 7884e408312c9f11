"""What all modules of the database share: its errors, its rows, and what it needs of an engine."""

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


def next_number(last: int, now_s: float, most_ahead_s: int = MOST_AHEAD_S) -> int:
    """The number after `last` of what a device takes only in rising order: the clock's seconds, so that a database
    restored from a backup goes on above what was used since; one more, where the clock is behind or so far ahead that
    it must be wrong: what follows it then is refused once the clock is right. last: 0 for none yet; most_ahead_s: as
    long as another database may have gone on without this one."""
    clock_s = int(now_s)
    rises = 0 < clock_s - last <= most_ahead_s or not last and 0 < clock_s <= HIGHEST_NUMBER
    return clock_s if rises else last + 1


def pieces(values: Sequence[Any], size: int = MAX_IN) -> Iterator[Sequence[Any]]:
    for at in range(0, len(values), size):
        yield values[at : at + size]


def marks(count: int) -> str:
    return ",".join("?" * count)
