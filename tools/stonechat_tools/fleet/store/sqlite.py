"""The database as a file: SQLite with WAL and synchronous=FULL.

What is acknowledged to a device, which then forgets it, has to survive a power cut of the host. A database file that is
moved away or damaged while the collector runs is replaced by a new one.
"""

import contextlib
import errno
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...console import owner
from . import schema
from .base import Db, StoreError, marks

_MARK = b"SQLite format 3\0"
_USE = os.R_OK | os.W_OK
_PAGE_LEAST = 512
_BUSY_S = 10.0
_CACHE_KIB = 16_384
_LOG_PAGES = 4_000  # a page that many batches change is written back once for all of them
_TRANSIENT = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Sqlite:
    """path: the database, made where there is none (mode 0600), or ":memory:". say: called with a line about a file
    that was moved or damaged. make: False for whoever shows what a collector fills: a database that is away, empty or
    damaged is waited for, and never made, filled or set aside."""

    integer, real, blob, key = "INTEGER", "REAL", "BLOB", "INTEGER PRIMARY KEY"

    def __init__(self, path: str, say: Callable[[str], None], make: bool = True) -> None:
        self.path = path
        self._make = make
        self.generation = 0
        self._say = say
        self._lock = threading.RLock()  # one transaction at a time, whatever thread it comes from
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # device and inode of the open database
        self._bytes = 0  # its size when it was last looked at
        try:
            self._open()
        except sqlite3.Error as error:
            raise self._error(error) from None

    @property
    def name(self) -> str:
        return self.path

    def close(self) -> None:
        with self._lock, contextlib.suppress(sqlite3.Error):
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Held by the collector that fills this database. Raises StoreError while another one does."""
        path = os.path.realpath(self.path) + ".lock"  # the same by whatever link it is called
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}", error.errno == errno.ENOSPC) from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
                raise StoreError(
                    f"{self.path}: another collector (process {holder or 'unknown'}) fills this database;"
                    " stop it or choose another --db"
                ) from None
            with contextlib.suppress(OSError):  # a full disk: who holds it is only for the message
                os.ftruncate(lock, 0)
                os.pwrite(lock, b"%d\n" % os.getpid(), 0)
            yield
        finally:
            os.close(lock)

    # --- the file -------------------------------------------------------------------------------------------------

    def _check_mark(self) -> None:
        """SQLite takes a file of less than a page for an empty one, and would write over it. Raises StoreError."""
        if not os.path.isfile(self.path) or os.path.getsize(self.path) >= _PAGE_LEAST:
            return
        try:
            with open(self.path, "rb") as file:
                mark = file.read(len(_MARK))
        except OSError:
            return  # opening the database says why
        if mark != _MARK[: len(mark)]:
            raise StoreError(f"{self.path}: file is not a database")

    def _open(self) -> None:
        """Raises StoreError or sqlite3.Error."""
        if not self._make and not os.path.exists(self.path):
            raise StoreError(f"{self.path}: it is not there any more; `stonechat collect` makes one", True)
        if self.path != ":memory:":
            try:
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            except FileExistsError:
                pass
            except OSError as error:
                raise StoreError(f"{self.path}: {error.strerror}", error.errno == errno.ENOSPC) from None
            if os.path.exists(self.path) and not os.path.isfile(self.path):  # a damaged one would be set aside
                raise StoreError(f"{self.path}: it is not a file")
            if os.path.isfile(self.path) and os.stat(self.path).st_nlink > 1:
                raise StoreError(
                    f"{self.path}: has a second name (a hard link), and each name would get a log of its own; remove"
                    " one of them, or make a copy while no collector runs"
                )
            self._check_mark()
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=_BUSY_S)
        try:
            self._file, self._bytes = self._file_now()
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if not version and not self._make:
                raise StoreError(f"{self.path}: nothing is in it yet; `stonechat collect` fills it", True)
            if version and not schema.OLDEST <= version <= schema.VERSION:
                raise StoreError(
                    f"{self.path}: made by another version ({version}) of stonechat; move it away and start again"
                )
            if db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            db.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
            if version != schema.VERSION:
                self._bring_up(db)
        except BaseException:
            db.close()
            raise
        self._connection = db
        self.generation += 1

    def _bring_up(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN IMMEDIATE")
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]  # another process may have been quicker
            if version == 0 and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise StoreError(f"{self.path}: a database of something else; choose another --db")
            if version and version != schema.VERSION:
                self._say(f"{self.path}: bringing version {version} of the database up to {schema.VERSION}")
            schema.bring_up(self, db, version)
            db.execute(f"PRAGMA user_version = {schema.VERSION}")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _file_now(self) -> tuple[tuple[int, int] | None, int]:
        """(device and inode, size) of what is at the path; (None, 0) where there is nothing."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None, 0
        return (found.st_dev, found.st_ino), found.st_size

    def _is_cut_off(self, size: int) -> bool:
        """Whether the file is shorter than its first page says (https://sqlite.org/fileformat.html, section 1.3)."""
        try:
            with open(self.path, "rb") as file:
                head = file.read(32)
        except OSError:
            return False
        page = int.from_bytes(head[16:18])
        return len(head) < 32 or size < int.from_bytes(head[28:32]) * (65_536 if page == 1 else page)

    @property
    def _db(self) -> sqlite3.Connection:
        """The connection to what is at the path now: opened anew where the file was moved or replaced."""
        if self._connection is not None:
            file, size = self._file_now()
            if file != self._file:
                self._say(f"{self.path}: moved or replaced; going on with what is there now")
                self._leave()
            elif size < self._bytes and self._is_cut_off(size):  # it never shrinks by itself, but by VACUUM
                self._set_aside("cut off")
            self._bytes = size
        if self._connection is None:
            self._open()
        assert self._connection is not None
        return self._connection

    def _leave(self) -> None:
        """Close a database that is no longer at the path, or has lost its log, with all that was committed in it."""
        assert self._connection is not None
        with contextlib.suppress(sqlite3.Error):  # closing alone would leave the log at the old path
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.close()

    def _error(self, error: sqlite3.Error) -> StoreError:
        """SQLite says `disk I/O error` for a full disk, too, and no more of a folder than that it can't be opened."""
        why = ""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        passes = code in _TRANSIENT
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            folder = os.path.dirname(os.path.abspath(self.path))
            if os.path.exists(self.path) and not os.path.isfile(self.path):
                why = "; it is not a file"
            elif os.path.isdir(folder) and os.statvfs(folder).f_bavail == 0:
                why, passes = "; its disk is full", True
            elif not os.access(folder, os.W_OK):
                why = f"; no right to write in {folder}"
            else:
                files = [self.path + end for end in ("", "-wal", "-shm")]
                why = next((owner(path) for path in files if os.path.exists(path) and not os.access(path, _USE)), "")
        return StoreError(f"{self.path}: {error}{why}", passes)

    def _failed(self, error: sqlite3.Error) -> StoreError:
        """After a write failed: set a damaged file aside, and begin with a new connection unless it is only a wait."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _DAMAGED:
            self._set_aside(str(error))
        elif code not in _TRANSIENT:
            self.close()
        return self._error(error)

    def _set_aside(self, why: str) -> None:
        """Raises StoreError where that is not for this process to do: somebody may be copying a backup there."""
        self.close()
        if not self._make:
            raise StoreError(f"{self.path}: {why}; copy a backup there, or let `stonechat collect` set it aside", True)
        aside = f"{self.path}.damaged-{time.strftime('%Y%m%dT%H%M%S')}"
        for end in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.rename(self.path + end, aside + end)
        self._say(f"{self.path}: {why}; kept as {aside}, a new database begins")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commits at the end, into the file that is at the path then. Raises StoreError with nothing stored there."""
        with self._lock:
            try:
                db = self._db
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        if db.in_transaction:  # a full disk has ended it already
                            db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._failed(error) from None
            if self._file != self._file_now()[0]:
                raise StoreError(f"{self.path}: moved while it was written to")
            if self._file is not None and not os.path.exists(self.path + "-wal"):
                self._say(f"{self.path}-wal: was removed; what it held is written to the database")
                self._leave()

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Raises StoreError."""
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise self._error(error) from None
            except UnicodeEncodeError:
                raise StoreError("asked for a name that is not UTF-8") from None

    def append(self, db: Db, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        db.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks(len(columns))})", rows)
