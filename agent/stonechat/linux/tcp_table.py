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

_MAX_TABLE_BYTES = 1 << 20
_MAX_CONNECTIONS = 200_000
_MAX_LINE_BYTES = 512
_MOST_FILES = 128  # of the agent itself
_ESTABLISHED, _SYN_SENT, _LISTEN = b"01", b"02", b"0A"
_LOOPBACK = (bytes(10) + b"\xff\xff\x7f", bytes(15) + b"\x01", bytes(16))  # 127.0.0.0/8, ::1, nobody
_CONTACT = 0x3FFFFFFF  # as in known_peers.py


def calls(proc: str = "/proc") -> list:
    """The connections whose local port nobody listens on: this machine opened them -> [(state, local port, address of
    16 bytes, inode of the socket as text)]."""
    rows = []
    for name, size in (("/net/tcp", 4), ("/net/tcp6", 16)):
        try:
            with open(proc + name, "rb") as file:
                lines = file.read(_MAX_TABLE_BYTES).split(b"\n")[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split(None, 10)
            if len(fields) >= 5:
                port, peer = fields[1].rpartition(b":")[2], fields[2].rpartition(b":")[0]
                rows.append((fields[3], port, peer, size, fields[9] if len(fields) > 9 else b""))
    listening = {port for state, port, _, _, _ in rows if state == _LISTEN}
    return [(state, port, _address(peer, size), ino) for state, port, peer, size, ino in rows if port not in listening]


def opened_connections(most: int = 512, proc: str = "/proc") -> list:
    """The peers of established connections that this machine opened -> addresses of 16 bytes."""
    return [address for state, _, address, _ in calls(proc) if state == _ESTABLISHED][:most]


def established(proc: str = "/proc"):
    """Yields (remote address of 4 or 16 bytes, remote port in hexadecimal, retransmits on end without an answer) of
    each established connection, however many others there are; the table is never held as a whole."""
    for name, size in (("/net/tcp", 4), ("/net/tcp6", 16)):
        try:
            with open(proc + name, "rb") as file:
                for _ in range(_MAX_CONNECTIONS):
                    line = file.readline(_MAX_LINE_BYTES)
                    if not line:
                        break
                    words = line.split(None, 7)
                    if len(words) < 8 or words[3] != _ESTABLISHED:
                        continue
                    try:
                        address, retransmits = _address(words[2][:-5], size), int(words[6], 16)
                    except (CollectorError, ValueError):
                        continue
                    if len(address) == 16:
                        yield address[12:] if address[:12] == _LOOPBACK[0][:12] else address, words[2][-4:], retransmits
        except OSError:
            continue


class TcpContacts:
    """contacts(): whom this machine called since the last reading, as LearnedPeers.contacts; secret: bytes."""

    def __init__(self, secret: bytes, proc: str = "/proc") -> None:
        self._secret = secret
        self._proc = proc
        self._last: set = set()

    def contacts(self) -> list:
        now = set()
        met = set()
        own = _own_sockets()
        for state, port, address, inode in calls(self._proc):
            now.add((port, address))
            if inode in own:
                continue
            alive = state in (_ESTABLISHED, _SYN_SENT)
            if (alive or (port, address) not in self._last) and not address.startswith(_LOOPBACK):
                met.add(address)
        self._last = now
        keys = [sha256(self._secret + address).digest()[:4] for address in sorted(met)]
        return [int.from_bytes(key, "big") & _CONTACT for key in keys]


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
