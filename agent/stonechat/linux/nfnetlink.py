"""nf_tables over netlink, without nft and its libraries: messages, batches, and the kernel's answers.

Formats: linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h. A batch is one transaction: all
of it holds from one packet to the next, or none. Lengths that the kernel reports are checked before they are used.
"""

import _socket
import errno
import os
from struct import pack, unpack_from

ANSWER_WITHIN_S = 2.0
MAX_ANSWERS = 4096  # of one request; a dump that brings more is broken
MAX_ATTRIBUTES = 1024  # of one message
INET = 1
NETDEV = 5
NEW_TABLE, GET_TABLE, DELETE_TABLE = 0, 1, 2
NEW_CHAIN = 3
NEW_RULE, GET_RULE = 6, 7
NEW_SET = 9
NEW_ELEMENT, GET_ELEMENT = 12, 13
GET_GENERATION = 16
NEW_OBJECT, GET_OBJECT = 18, 19
COUNTER = 1  # type of an object
_NETLINK_NETFILTER = 12
_SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 16, 17
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP, _CREATE, _APPEND = 1, 4, 0x300, 0x400, 0x800
_CAPPED, _ACK_TLVS = 0x100, 0x200
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_HEADER_BYTES = 16
_GENERAL_BYTES = 4  # struct nfgenmsg
_NESTED = 0x8000
_KIND = 0x3FFF
_BUFFER_BYTES = 65536
_SEND_BUFFER_FORCE = 32  # SO_SNDBUFFORCE, asm-generic/socket.h
_SEND_BYTES = 1 << 20

WHY = {
    errno.EPERM: "not permitted: it needs CAP_NET_ADMIN (start as root, or AmbientCapabilities= of the unit)",
    errno.EACCES: "not permitted: it needs CAP_NET_ADMIN (start as root, or AmbientCapabilities= of the unit)",
    errno.EPROTONOSUPPORT: "this kernel has no nf_tables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)",
    errno.EAFNOSUPPORT: "this kernel has no nf_tables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)",
    errno.EOPNOTSUPP: "this kernel has no support for it",
}


def attribute(kind: int, data: bytes) -> bytes:
    return pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(parts))


def text(kind: int, word: str) -> bytes:
    return attribute(kind, os.fsencode(word) + b"\0")


def u32(kind: int, value: int) -> bytes:
    """Big-endian, as nf_tables has its numbers."""
    return attribute(kind, pack("!I", value & 0xFFFFFFFF))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, pack("!Q", value))


def attributes(buffer: "bytes | bytearray", start: int, end: int) -> dict:
    """The attributes between start and end -> {kind: (start, end) of its payload}; the last one of a kind counts.
    Raises OSError (EBADMSG) for lengths that do not fit."""
    found: dict = {}
    for _ in range(MAX_ATTRIBUTES):
        if start + 4 > end:
            return found
        length, kind = unpack_from("=HH", buffer, start)
        if length < 4 or start + length > end:
            raise OSError(errno.EBADMSG, "netfilter: attribute of %d bytes in %d" % (length, end - start))
        found[kind & _KIND] = (start + 4, start + length)
        start += length + 3 & ~3
    raise OSError(errno.EBADMSG, "netfilter: more than %d attributes" % MAX_ATTRIBUTES)


def elements(buffer: "bytes | bytearray", span: tuple) -> list:
    """The payloads of a nested list (NFTA_LIST_ELEM) -> [(start, end)]. Raises OSError."""
    start, end = span
    found: list = []
    while start + 4 <= end:
        length, _ = unpack_from("=HH", buffer, start)
        if length < 4 or start + length > end or len(found) >= MAX_ATTRIBUTES:
            raise OSError(errno.EBADMSG, "netfilter: list element of %d bytes in %d" % (length, end - start))
        found.append((start + 4, start + length))
        start += length + 3 & ~3
    return found


def number(buffer: "bytes | bytearray", found: dict, kind: int) -> "int | None":
    """A big-endian number of 1 to 8 bytes, None where it is missing."""
    if kind not in found:
        return None
    start, end = found[kind]
    if not 0 < end - start <= 8:
        raise OSError(errno.EBADMSG, "netfilter: number of %d bytes" % (end - start))
    return int.from_bytes(buffer[start:end], "big")


class Batch:
    """Messages that go together. `what` names each in an error: "chain output"."""

    def __init__(self) -> None:
        self.messages: list = []  # (kind, flags, family, body)
        self.what: list = []

    def add(self, what: str, kind: int, family: int, *parts: bytes) -> None:
        create = kind in (NEW_TABLE, NEW_CHAIN, NEW_RULE, NEW_SET, NEW_ELEMENT, NEW_OBJECT)
        flags = _CREATE | (_APPEND if kind == NEW_RULE else 0) if create else 0
        self.messages.append((kind, flags, family, b"".join(parts)))
        self.what.append(what)


class NfTables:
    """One netlink socket, in the network namespace in which it was made. Raises OSError with a clear text,
    EBADMSG for answers that make no sense."""

    def __init__(self) -> None:
        self._sequence = int.from_bytes(os.urandom(3), "big")
        self._buffer = bytearray(_BUFFER_BYTES)
        try:
            self._netlink = _socket.socket(16, 3, _NETLINK_NETFILTER)  # AF_NETLINK, SOCK_RAW
        except OSError as error:
            raise explained(error.errno or 0, "")
        try:  # a long allow-list takes more than the 160 KB that a socket may send at once on 32 bit
            self._netlink.setsockopt(_socket.SOL_SOCKET, _SEND_BUFFER_FORCE, _SEND_BYTES)
        except OSError:  # without CAP_NET_ADMIN, and then there is nothing to send
            pass
        for option in (_CAP_ACK, _EXT_ACK):
            try:
                self._netlink.setsockopt(_SOL_NETLINK, option, 1)
            except OSError:  # before Linux 4.12
                pass

    def close(self) -> None:
        self._netlink.close()

    def run(self, batch: Batch, commit: bool = True) -> None:
        """commit: else the kernel checks all of it and takes it back, as no batch is carried out that does not end.
        Raises OSError that names the first message that was refused."""
        first = self._sequence + 2
        data = [self._message(_BATCH_BEGIN, _REQUEST, 0, 10)]
        last = len(batch.messages) - 1
        for i, (kind, flags, family, body) in enumerate(batch.messages):
            data.append(
                self._message(_SUBSYSTEM | kind, flags | _REQUEST | (_ACK if i == last else 0), family, 0, body)
            )
        if commit:
            data.append(self._message(_BATCH_END, _REQUEST, 0, 10))
        self._flush()
        self._send(b"".join(data))
        refused: tuple | None = None
        for _, sequence, _, code, said in self._answers():
            at = sequence - first
            if code and refused is None:
                refused = (code, batch.what[at] if 0 <= at <= last else "", said)
            if at == last or at < 0:  # of the batch itself: nothing comes after it
                break
        if refused:
            raise explained(*refused)

    def ask(self, kind: int, family: int, *parts: bytes, dump: bool = False):
        """A question that changes nothing: yields (buffer, attributes) of each message of the answer. Raises OSError
        (FileNotFoundError where there is no such thing)."""
        self._flush()
        body = b"".join(parts)
        self._send(self._message(_SUBSYSTEM | kind, _REQUEST | (_DUMP if dump else _ACK), family, 0, body))
        asked = self._sequence
        for message, sequence, end, code, said in self._answers():
            if sequence != asked:
                continue
            if message in (_ERROR, _DONE):
                if code:
                    raise explained(code, "", said)
                return
            start = end[0] + _HEADER_BYTES + _GENERAL_BYTES
            yield self._buffer, attributes(self._buffer, start, end[1])

    def _message(self, kind: int, flags: int, family: int, resource: int, body: bytes = b"") -> bytes:
        self._sequence += 1
        general = pack("!BBH", family, 0, resource)
        length = _HEADER_BYTES + len(general) + len(body)
        return pack("=IHHII", length, kind, flags, self._sequence & 0xFFFFFFFF, 0) + general + body

    def _send(self, data: bytes) -> None:
        try:
            self._netlink.send(data)
        except OSError as error:
            raise explained(error.errno or 0, "")

    def _flush(self) -> None:
        """Drop what is left of an answer that was given up."""
        self._netlink.settimeout(0)
        try:
            for _ in range(MAX_ANSWERS):
                self._netlink.recv_into(self._buffer)
        except OSError:  # nothing is left
            pass
        finally:
            self._netlink.settimeout(ANSWER_WITHIN_S)

    def _answers(self):
        """Yields (kind, sequence number, (start, end), error code, what the kernel says about it) of each message."""
        buffer = self._buffer
        left = MAX_ANSWERS
        while left > 0:
            try:
                n_bytes = self._netlink.recv_into(buffer)
            except TimeoutError:
                raise OSError(errno.ETIMEDOUT, "netfilter: the kernel does not answer")
            offset = 0
            left -= 1
            while offset + _HEADER_BYTES <= n_bytes:
                left -= 1
                length, kind, flags, sequence = unpack_from("=IHHI", buffer, offset)
                if length < _HEADER_BYTES or offset + length > n_bytes:
                    raise OSError(errno.EBADMSG, "netfilter: message of %d bytes in %d" % (length, n_bytes - offset))
                code, said = 0, ""
                if kind in (_ERROR, _DONE) and length >= _HEADER_BYTES + 4:
                    code = -unpack_from("=i", buffer, offset + _HEADER_BYTES)[0]
                    said = _extended(buffer, offset, length, flags) if code and kind == _ERROR else ""
                yield kind, sequence, (offset, offset + length), code, said
                offset += length + 3 & ~3
        raise OSError(errno.EBADMSG, "netfilter: the kernel's answer does not end")


def _extended(buffer: bytearray, offset: int, length: int, flags: int) -> str:
    """The kernel's own words of an error, where it has some."""
    if not flags & _ACK_TLVS or not flags & _CAPPED:
        return ""
    found = attributes(buffer, offset + _HEADER_BYTES + 4 + _HEADER_BYTES, offset + length)
    if 1 not in found:  # NLMSGERR_ATTR_MSG
        return ""
    start, end = found[1]
    return bytes(buffer[start : min(end, start + 200)]).split(b"\0")[0].decode("ascii", "replace")


def explained(code: int, what: str, said: str = "") -> OSError:
    """An OSError whose text says what was refused, and why; FileNotFoundError for ENOENT."""
    words = [word for word in (what, WHY.get(code) or os.strerror(code), said) if word]
    return OSError(code, "netfilter: " + ": ".join(words))
