"""Accounts of the dashboard, their sessions, and how often somebody may try to log in.

A password is kept as scrypt (RFC 7914) with a salt of its own. Sessions are kept in memory, by the hash of their
cookie: they end with the process, with an idle hour, and when their account is changed or removed.
"""

import base64
import hashlib
import hmac
import ipaddress
import os
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from stonechat.errors import ConfigError

from ..fleet.store import Store

ROLES = ("viewer", "operator")
LEAST_PASSWORD = 10
MOST_PASSWORD = 1024
MAX_NAME = 32
_LOG_N, _R, _P = 15, 8, 1  # 32 MB and about 0.1 s for each try
IDLE_S, LONGEST_S = 3600.0, 12 * 3600.0
MAX_SESSIONS = 1000
WINDOW_S = 300.0
NAME_TRIES, ADDRESS_TRIES = 5, 20  # failed log-ins in WINDOW_S, of one account from one address, and of one address
MAX_ADDRESS = 64
ACCOUNT_TRIES = 100  # of one account from all addresses: above that only those that it has logged in from before
MAX_COUNTED = 10_000
NOTED = 50  # refused log-ins in the audit log in WINDOW_S
CACHE_S = 2.0


@dataclass(frozen=True, slots=True)
class Account:
    name: str
    role: str
    secret: str
    changed_s: float


def _is_name(name: str) -> bool:
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    return 1 <= len(name) <= MAX_NAME and plain.isascii() and plain.isalnum()


def check_name(name: str) -> str:
    """Raises ConfigError."""
    if not _is_name(name):
        raise ConfigError(f"{name[:40]!r}: want 1 to {MAX_NAME} letters, digits, -, _ and .")
    return name


def _is_text(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def hashed(password: str, salt: bytes | None = None) -> str:
    salt = os.urandom(16) if salt is None else salt
    found = hashlib.scrypt(password.encode(), salt=salt, n=1 << _LOG_N, r=_R, p=_P, maxmem=1 << 27, dklen=32)
    return f"scrypt${_LOG_N}${_R}${_P}${base64.b64encode(salt).decode()}${base64.b64encode(found).decode()}"


def equal(given: str, wanted: str) -> bool:
    """In a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())


def matches(password: str, secret: str) -> bool:
    """In the same time whatever the password is."""
    try:
        _, log_n, r, p, salt, wanted = secret.split("$")
        found = hashlib.scrypt(
            password[:MOST_PASSWORD].encode("utf-8", "replace"),
            salt=base64.b64decode(salt),
            n=1 << min(20, int(log_n)),
            r=int(r),
            p=int(p),
            maxmem=1 << 27,
            dklen=32,
        )
        return hmac.compare_digest(found, base64.b64decode(wanted))
    except ValueError:  # a database that somebody has written to
        return False


_NOBODY = ""  # a secret that is compared with where there is no account; made at the first need


def _nobody() -> str:
    global _NOBODY
    if not _NOBODY:
        _NOBODY = hashed(secrets.token_hex(16))
    return _NOBODY


# --- the database -----------------------------------------------------------------------------------------------------


def read(store: Store, name: str | None = None) -> list[Account]:
    where, values = ("", ()) if name is None else (" WHERE name = ?", (name,))
    rows = store.rows(f"SELECT name, role, secret, changed_s FROM accounts{where} ORDER BY name", values)
    return [Account(*row) for row in rows]


def put(store: Store, name: str, role: str, password: str, now_s: float | None = None) -> None:
    """Make an account, or change it. Raises ConfigError for a name or a password that is refused."""
    check_name(name)
    if role not in ROLES:
        raise ConfigError(f"--role {role}: want {' or '.join(ROLES)}")
    if not _is_text(password):
        raise ConfigError("a password is text in UTF-8; this one has bytes that are none")
    if not LEAST_PASSWORD <= len(password) <= MOST_PASSWORD:
        raise ConfigError(f"a password has {LEAST_PASSWORD} to {MOST_PASSWORD} characters, this one {len(password)}")
    now_s = time.time() if now_s is None else now_s
    with store.transaction() as db:
        db.execute(
            "INSERT INTO accounts VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET role = excluded.role,"
            " secret = excluded.secret, changed_s = excluded.changed_s",
            (name, role, hashed(password), now_s),
        )


def remove(store: Store, name: str) -> None:
    """Raises ConfigError where there is none."""
    if not read(store, name):
        raise ConfigError(f"{name}: no such account; `stonechat dashboard user list` shows them")
    with store.transaction() as db:
        db.execute("DELETE FROM accounts WHERE name = ?", (name,))


def authentic(store: Store, name: str, password: str) -> Account | None:
    """Takes as long for a name that there is not. Raises StoreError."""
    found = read(store, name) if _is_name(name) else []
    right = matches(password, found[0].secret if found else _nobody())
    return found[0] if found and right else None


# --- sessions ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Session:
    name: str
    role: str
    csrf: str
    began_s: float
    used_s: float
    changed_s: float  # of its account
    checked_s: float


class Sessions:
    """store: asked at most every CACHE_S whether the account is as it was."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._held: OrderedDict[bytes, Session] = OrderedDict()

    @staticmethod
    def _key(cookie: str) -> bytes:
        return hashlib.sha256(cookie.encode("utf-8", "replace")).digest()

    def begin(self, account: Account) -> tuple[str, Session]:
        """-> (the cookie's value, the session)."""
        now_s = self._clock()
        cookie = secrets.token_urlsafe(32)
        while len(self._held) >= MAX_SESSIONS:
            self._held.popitem(last=False)
        session = Session(account.name, account.role, secrets.token_urlsafe(24), now_s, now_s, account.changed_s, now_s)
        self._held[self._key(cookie)] = session
        return cookie, session

    def get(self, cookie: str, used: bool = True) -> Session | None:
        """used: by somebody, and not by a page that refreshes itself: that one's session is idle. Raises StoreError."""
        key = self._key(cookie)
        session = self._held.get(key)
        if session is None:
            return None
        now_s = self._clock()
        ended = now_s - session.used_s > IDLE_S or now_s - session.began_s > LONGEST_S
        if not ended and now_s - session.checked_s > CACHE_S:
            found = read(self._store, session.name)
            ended = not found or found[0].changed_s != session.changed_s
            session.checked_s = now_s
        if ended:
            self._held.pop(key, None)
            return None
        if used:
            session.used_s = now_s
        return session

    def end(self, cookie: str) -> None:
        self._held.pop(self._key(cookie), None)


def network(address: str) -> str:
    """What is counted as one address: whoever has an IPv6 network has 2^64 of them."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # of a proxy that passes on what anybody wrote
        return address[:MAX_ADDRESS]
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.IPv6Network((found, 64), strict=False))


class Tries:
    """Failed log-ins of the last WINDOW_S. wait_s() -> seconds until another may be made, 0 for now. failed() ->
    whether it may be noted in the audit log: strangers must not fill the database."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: OrderedDict[tuple[str, ...], deque[float]] = OrderedDict()
        self._noted: deque[float] = deque()

    def _keys(self, name: str, address: str) -> list[tuple[tuple[str, ...], int]]:
        place = network(address)
        return [((place,), ADDRESS_TRIES), ((name[:MAX_NAME], place), NAME_TRIES)]

    @staticmethod
    def _crowd(name: str) -> list[tuple[tuple[str, ...], int]]:
        return [((name[:MAX_NAME], "", ""), ACCOUNT_TRIES)]

    def wait_s(self, name: str, address: str) -> float:
        return self._wait_s(self._keys(name, address))

    def crowd_s(self, name: str) -> float:
        """As wait_s(), for addresses that the account has never logged in from: many of them try its password."""
        return self._wait_s(self._crowd(name))

    def _wait_s(self, keys: list[tuple[tuple[str, ...], int]]) -> float:
        now_s, wait_s = self._clock(), 0.0
        for key, most in keys:
            failed = self._failed.get(key, deque())
            while failed and now_s - failed[0] > WINDOW_S:
                failed.popleft()
            if len(failed) >= most:
                wait_s = max(wait_s, failed[0] + WINDOW_S - now_s)
        return wait_s

    def failed(self, name: str, address: str) -> bool:
        for key, most in self._keys(name, address) + self._crowd(name):
            held = self._failed.setdefault(key, deque(maxlen=most))
            held.append(self._clock())
            self._failed.move_to_end(key)
        while len(self._failed) > MAX_COUNTED:
            self._failed.popitem(last=False)
        now_s = self._clock()
        while self._noted and now_s - self._noted[0] > WINDOW_S:
            self._noted.popleft()
        if len(self._noted) >= NOTED:
            return False
        self._noted.append(now_s)
        return True
