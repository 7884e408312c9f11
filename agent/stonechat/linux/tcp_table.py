"""The kernel's table of TCP connections, /proc/net/tcp and tcp6: whom this machine has called.

Where there is no BPF, lasting_peers.py gets its contacts from here. Between two readings a connection is seen if it is
still there, or was closed from this side: it stays in TIME_WAIT for a minute. UDP, and what the other side closed
within a window, is not seen. The agent's own connections are no contacts: its broker may move to another address any
day. Reading the table costs what the kernel's walk over its hash costs: 0.5 ms on a small
machine.
"""

import os
import stat
import sys

from ..compat import sha256
from ..errors import CollectorError

_MAX_CALLS = 7000  # of a table: what fits 1 MB
_MAX_CONNECTIONS = 200_000
_MAX_LINE_BYTES = 512
_TRIES = 3
_MOST_FILES = 128  # of the agent itself
_ESTABLISHED, _SYN_SENT, _LISTEN = b"01", b"02", b"0A"
_LOOPBACK = (bytes(10) + b"\xff\xff\x7f", bytes(15) + b"\x01", bytes(16))  # 127.0.0.0/8, ::1, nobody
_CONTACT = 0x3FFFFFFF  # as in known_peers.py


def read_calls(take, proc: str = "/proc"):
    """take(calls) -> what it returns; calls: an iterator over (state, local port, address of 16 bytes, inode of the
    socket as text) of each connection whose local port nobody listens on: this machine opened it. At most _MAX_CALLS of
    a table; the table is never held as a whole. The kernel gives no moment at which listeners and connections are both
    as they are: where somebody has begun to listen meanwhile, all of it is taken anew."""
    listening = _listening(proc)
    for _ in range(_TRIES):
        found = take(_calls(proc, listening))
        after = _listening(proc)
        if after <= listening:
            break
        listening |= after
    return found


def _listening(proc: str) -> set:
    return {words[1][-4:] for path, _ in _tables(proc) for words in _listeners(path)}


def _calls(proc: str, listening: set):
    for path, size in _tables(proc):
        for words in _rows(path, _MAX_CALLS):
            if words[3] != _LISTEN and words[1][-4:] not in listening:
                yield words[3], words[1][-4:], _address(words[2][:-5], size), words[9] if len(words) > 9 else b""


def opened_connections(most: int = 512, proc: str = "/proc") -> list:
    """The peers of established connections that this machine opened -> addresses of 16 bytes."""

    def opened(calls):
        addresses = (address for state, _, address, _ in calls if state == _ESTABLISHED)
        return [address for _, address in zip(range(most), addresses, strict=False)]

    return read_calls(opened, proc)


def established(proc: str = "/proc"):
    """Yields (remote address of 4 or 16 bytes, remote port in hexadecimal, retransmits on end without an answer) of
    each established connection, however many others there are."""
    for path, size in _tables(proc):
        for words in _rows(path, _MAX_CONNECTIONS):
            if words[3] != _ESTABLISHED:
                continue
            try:
                address, retransmits = _address(words[2][:-5], size), int(words[6], 16)
            except (CollectorError, IndexError, ValueError):
                continue
            if len(address) == 16:
                yield address[12:] if address[:12] == _LOOPBACK[0][:12] else address, words[2][-4:], retransmits


def _tables(proc: str) -> tuple:
    return (proc + "/net/tcp", 4), (proc + "/net/tcp6", 16)


def _listeners(path: str):
    """The kernel prints the listeners first: tcp_seq_start() in net/ipv4/tcp_ipv4.c."""
    for words in _rows(path, _MAX_CONNECTIONS):
        if words[3] != _LISTEN:
            return
        yield words


def _rows(path: str, most: int):
    """Yields the words of at most `most` lines after the heading, a line at a time; nothing where there is no file."""
    try:
        with open(path, "rb") as file:
            file.readline(_MAX_LINE_BYTES)
            for _ in range(most):
                line = file.readline(_MAX_LINE_BYTES)
                if not line:
                    return
                words = line.split(None, 10)
                if len(words) >= 5:
                    yield words
    except OSError:
        return


class TcpContacts:
    """contacts(): whom this machine called since the last reading, as LearnedPeers.contacts; secret: bytes."""

    def __init__(self, secret: bytes, proc: str = "/proc") -> None:
        self._secret = secret
        self._proc = proc
        self._last: set = set()  # hashes: 7,000 connections that ended are there after a scan

    def contacts(self) -> list:
        self._last, met = read_calls(self._take, self._proc)
        keys = [sha256(self._secret + address).digest()[:4] for address in sorted(met)]
        return [int.from_bytes(key, "big") & _CONTACT for key in keys]

    def _take(self, calls) -> tuple:
        now = set()
        met = set()
        own = _own_sockets()
        for state, port, address, inode in calls:
            connection = hash((port, address))
            now.add(connection)
            if inode in own:
                continue
            alive = state in (_ESTABLISHED, _SYN_SENT)
            if (alive or connection not in self._last) and not address.startswith(_LOOPBACK):
                met.add(address)
        return now, met


def _own_sockets() -> set:
    """The inodes of this process's sockets as text. /proc/self/fd can't be asked after a change of user."""
    inodes = set()
    for fd in range(_MOST_FILES):
        try:
            found = os.fstat(fd)
        except OSError:
            continue
        if stat.S_ISSOCK(found.st_mode):
            inodes.add(b"%d" % found.st_ino)
    return inodes


def _address(text: bytes, size: int) -> bytes:
    """An address as /proc/net/tcp prints it, in words of the machine's byte order."""
    try:
        raw = bytes.fromhex(text.decode())
    except ValueError:
        raise CollectorError("/proc/net/tcp: %r is no address" % text[:40])
    if sys.byteorder == "little":
        raw = b"".join([raw[i : i + 4][::-1] for i in range(0, len(raw), 4)])
    return bytes(10) + b"\xff\xff" + raw if size == 4 else raw
