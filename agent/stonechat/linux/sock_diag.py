"""The ports that listen, from the kernel's socket table: 15 us over netlink, whatever the number of connections.

Formats: linux/inet_diag.h, linux/netlink.h, linux/sock_diag.h. The kernel walks its short table of listeners only,
because the request asks for the state LISTEN alone. `_socket` instead of `socket` saves 1.4 MB.
"""

import _socket
import os
from struct import pack, unpack_from

from ..errors import CollectorError

MAX_LISTENERS = 65536  # ports there are; a dump that brings more messages than twice that is broken
ANSWER_WITHIN_S = 1.0
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_HEADER_BYTES = 16
_TCP = 6
_STATE_LISTEN = 10
_AF_INET = 2
_AF_INET6 = 10


class NetlinkListeners:
    """`count()` -> how many distinct TCP ports listen, IPv4 and IPv6 together. Raises OSError where the kernel has no
    INET_DIAG, CollectorError where its answer makes no sense."""

    source = "sock_diag"

    def __init__(self) -> None:
        self._buffer = bytearray(32768)
        self._sequence = 0
        self._netlink = _socket.socket(16, 3, _NETLINK_SOCK_DIAG)  # AF_NETLINK, SOCK_RAW
        self._netlink.settimeout(ANSWER_WITHIN_S)

    def count(self) -> int:
        ports: set[int] = set()
        self._dump(_AF_INET, ports)
        try:
            self._dump(_AF_INET6, ports)
        except FileNotFoundError:  # a kernel without IPv6
            pass
        return len(ports)

    def close(self) -> None:
        self._netlink.close()

    def _dump(self, family: int, ports: set[int]) -> None:
        self._sequence += 1
        request = pack("=BBBBI", family, _TCP, 0, 0, 1 << _STATE_LISTEN) + bytes(48)
        header = pack(
            "=IHHII",
            _HEADER_BYTES + len(request),
            _SOCK_DIAG_BY_FAMILY,
            _NLM_F_REQUEST_DUMP,
            self._sequence,
            0,
        )
        self._netlink.send(header + request)
        for _ in range(2 * MAX_LISTENERS):
            if self._parse(self._netlink.recv_into(self._buffer), ports):
                return
        raise CollectorError("sock_diag: the kernel's list of listening sockets does not end")

    def _parse(self, n_bytes: int, ports: set[int]) -> bool:
        """One datagram of answers into `ports` -> True when it was the last."""
        buffer = self._buffer
        offset = 0
        while offset + _HEADER_BYTES <= n_bytes:
            length, kind, _, sequence = unpack_from("=IHHI", buffer, offset)
            if length < _HEADER_BYTES or offset + length > n_bytes:
                raise CollectorError("sock_diag: message of %d bytes in %d" % (length, n_bytes - offset))
            if sequence == self._sequence:  # else the rest of a dump that was given up
                if kind == _NLMSG_DONE:
                    return True
                if kind == _NLMSG_ERROR:
                    code = -unpack_from("=i", buffer, offset + _HEADER_BYTES)[0]
                    raise OSError(code, os.strerror(code))
                if kind == _SOCK_DIAG_BY_FAMILY and length >= _HEADER_BYTES + 6:
                    ports.add(unpack_from("!H", buffer, offset + _HEADER_BYTES + 4)[0])
            offset += length + 3 & ~3
        return False


class TableListeners:
    """The same from /proc/net/tcp and tcp6, for kernels without INET_DIAG. The kernel prints the listeners first, so
    reading stops at the first other socket."""

    source = "/proc/net/tcp"
    _PAGE_BYTES = 4096

    def __init__(self, proc: str = "/proc") -> None:
        self._fds = [os.open(proc + "/net/tcp", os.O_RDONLY | os.O_CLOEXEC)]
        try:
            self._fds.append(os.open(proc + "/net/tcp6", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:  # a kernel without IPv6
            pass

    def count(self) -> int:
        ports: set[int] = set()
        for fd in self._fds:
            self._scan(fd, ports)
        return len(ports)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def _scan(self, fd: int, ports: set[int]) -> None:
        offset = 0
        rest = b""
        while len(ports) <= MAX_LISTENERS:
            page = os.pread(fd, self._PAGE_BYTES, offset)
            if not page:
                return
            offset += len(page)
            lines = (rest + page).split(b"\n")
            rest = lines.pop()
            for line in lines:
                fields = line.split(None, 4)
                if len(fields) < 4 or fields[0] == b"sl":
                    continue
                if fields[3] != b"0A":
                    return
                ports.add(int(fields[1][-4:], 16))
