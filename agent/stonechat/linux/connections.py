"""Who this machine talks to: every packet of every local socket, raw sockets included, for 100 ns a packet.

Two programs of packet_program.py on the root of cgroup v2, one a direction, count into one mapped memory, which is
described there. Reading it takes no system call and no privilege, so that nothing is left to hold once the programs are
attached.
"""

import _socket
import os
import struct

from ..errors import CollectorError
from ..features import log2_q8
from . import bpf
from .cgroup_id import CgroupId, cgroup_root
from .packet_program import (
    BANK_SHIFT,
    BANKS_AT,
    COUNTERS_AT,
    ENTRIES_AT,
    ENTRY,
    EPOCH_AT,
    EXCLUDED_AT,
    INTERFACES,
    INTERFACES_AT,
    MAX_EXCLUDED,
    MAX_PEERS,
    ONLY_AT,
    PACKETS_SHIFT,
    PEER_BITS_AT,
    PORT_BITS_AT,
    SIZE,
    PacketProgram,
)


class Connections:
    """After read(): `counters`, cumulative, by the names of packet_program.py; and for the time since the last read
    `peers`, a list of (address 16 bytes, sent, received), `distinct_peers`, `distinct_ports`. What was sent and
    received, also by the OVERFLOW and OWN counters, is (packets << 40) + bytes; packets() and octets() take it apart.
    services: the Services whose packets count by themselves, too.

    `opened`: which of `peers` this machine wrote to first, {address: OPENED_TCP or OPENED_UDP}.

    cgroup: the folder to watch, which may come and go; None: all (the programs are on the root). interfaces: names,
    None for all but `lo`. own_user_id: sockets of this user are the agent's own and count apart. Raises CollectorError
    or OSError."""

    group = "connections"
    source = "cgroup_skb"

    def __init__(
        self,
        interfaces: "tuple[str, ...] | list[str] | None" = None,
        cgroup: "str | None" = None,
        own_user_id: "int | None" = None,
        services=None,
    ) -> None:
        self.counters = [0] * 7
        self._services = services
        self.peers: list = []
        self.opened: dict = {}
        self.distinct_peers = 0
        self.distinct_ports = 0
        self._interfaces = None if interfaces is None else tuple(interfaces)
        self.own_user_id = own_user_id
        self._seeds = struct.unpack("=QQ", os.urandom(16))
        self._links: list = []
        root = cgroup_root()
        self._only = CgroupId(cgroup) if cgroup else None
        self.note = "every socket's packets, IPv4 and IPv6"
        if cgroup is not None or os.path.exists(root + "/cgroup.events"):  # the true root has no such file
            self.note = "only sockets of %s and below" % (cgroup or root)
        self._memory = bpf.Memory(SIZE, "stonechat_net")
        self._choose_cgroup()
        try:
            self._choose_interfaces()
            self._attach(root)
        except (OSError, CollectorError):
            self.close()
            raise

    def exclude(self, addresses: list, port: int) -> None:
        """Leave the agent's own flow to its broker out. addresses: texts, IPv4 or IPv6; those beyond MAX_EXCLUDED are
        ignored."""
        rows = b"".join(struct.pack("=Q16s", port, packed_address(text)) for text in addresses[:MAX_EXCLUDED])
        end = EXCLUDED_AT + 24 * MAX_EXCLUDED
        self._memory.bytes[EXCLUDED_AT:end] = rows.ljust(24 * MAX_EXCLUDED, b"\0")

    def read(self) -> None:
        words = self._memory.words
        if self._interfaces is not None:
            self._choose_interfaces()  # one that was taken away and comes back has a new index
        self._choose_cgroup()
        epoch = words[EPOCH_AT // 8]
        words[EPOCH_AT // 8] = epoch ^ 1
        bank = BANKS_AT + (epoch << BANK_SHIFT)
        first = COUNTERS_AT // 8
        self.counters[:] = words[first : first + len(self.counters)].tolist()
        bits = self._memory.bytes
        self.distinct_ports = distinct(bits[bank + PORT_BITS_AT : bank + ENTRIES_AT])
        self.distinct_peers = distinct(bits[bank + PEER_BITS_AT : bank + PORT_BITS_AT])
        self.peers = self._entries(bank + ENTRIES_AT)
        used = ENTRIES_AT + MAX_PEERS * ENTRY
        bits[bank : bank + used] = bytes(used)

    def close(self) -> None:
        for link in self._links:
            os.close(link)
        self._links = []
        self._memory.close()

    def _entries(self, at: int) -> list:
        step = ENTRY // 8
        hashes = self._memory.words[at // 8 : at // 8 + MAX_PEERS * step : step].tolist()
        found = []
        self.opened = {}
        for i, key in enumerate(hashes):
            if key:
                row = struct.unpack_from("=QQ16sQ", self._memory.bytes, at + i * ENTRY + 8)
                sent, received, address, opened = row
                found.append((address, sent, received))
                if opened:
                    self.opened[address] = opened
        return found

    def _choose_cgroup(self) -> None:
        if self._only is not None:
            self._memory.words[ONLY_AT // 8] = self._only.refresh()

    def _choose_interfaces(self) -> None:
        bits = bytearray(INTERFACES // 8)
        for name in self._interfaces or ():
            try:
                index = _socket.if_nametoindex(name)
            except OSError:
                continue  # not there yet, or not any more
            index = index if index < INTERFACES else 0
            bits[index >> 3] |= 1 << (index & 7)
        self._memory.bytes[INTERFACES_AT : INTERFACES_AT + len(bits)] = bytes(bits)

    def _attach(self, root: str) -> None:
        cgroup_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for direction, name in (
                (bpf.ATTACH_CGROUP_EGRESS, "stonechat_out"),
                (bpf.ATTACH_CGROUP_INGRESS, "stonechat_in"),
            ):
                program = self._program(direction == bpf.ATTACH_CGROUP_EGRESS)
                program_fd = bpf.load_program(bpf.PROG_CGROUP_SKB, program, name, direction)
                try:
                    self._links.append(bpf.attach_cgroup(program_fd, cgroup_fd, direction))
                finally:
                    os.close(program_fd)  # the link keeps the program
        finally:
            os.close(cgroup_fd)
        self._memory.release_fd()

    def _program(self, outward: bool) -> bpf.Program:
        every = self._interfaces is None
        made = PacketProgram(self._memory.fd, every, self._only, self.own_user_id, self._seeds, self._services)
        return made.make(outward)


def packets(traffic: int) -> int:
    return traffic >> PACKETS_SHIFT


def octets(traffic: int) -> int:
    return traffic & (1 << PACKETS_SHIFT) - 1


def packed_address(text: str) -> bytes:
    """ "192.0.2.1" or "2001:db8::1" -> 16 bytes, IPv4 as ::ffff:192.0.2.1. Raises OSError."""
    if ":" in text:
        return _socket.inet_pton(_socket.AF_INET6, text)
    return bytes(10) + b"\xff\xff" + _socket.inet_pton(_socket.AF_INET, text)


def distinct(bits: "bytes | bytearray | memoryview") -> int:
    """m bits (a power of two) of which each item set one at random -> how many items there were (linear counting,
    Whang et al. 1990: n = -m ln(1 - set / m)). 16,384 bits: within 2 % up to 20,000, at most 159,000, where all bits
    are set."""
    m = 8 * len(bits)
    ones = int.from_bytes(bits, "little").bit_count()
    if ones <= m // 8:  # the series of the logarithm, finer than log2_q8
        return ones + ones * ones // (2 * m) + ones**3 // (3 * m * m)
    bits_q8 = log2_q8(m) - log2_q8(max(1, m - ones))
    return bits_q8 * m * 11357 >> 22  # ln 2 / 256 = 11357 / 2^22
