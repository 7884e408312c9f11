"""Who this machine talks to: every packet of every local socket, raw sockets included, for 100 ns a packet.

Two programs of type cgroup_skb on the root of cgroup v2, one a direction, count into one mapped memory. Reading it
takes no system call and no privilege, so that nothing is left to hold once the programs are attached.

    header  settings that this process writes, and the counters
    bank    distinct peers and destination ports (each sets one bit of many) and the peers themselves, 512 entries

There are two banks: programs write to one while this process reads and clears the other, turn by turn, so that each
read sees the peers since the last. A full set of entries turns nobody out: packets of peers that find no place are
counted as `overflow`, and their number comes from the bits. So a spray of addresses looks like what it is.

Entries are found by a hash with a random seed that stays in this process, which nobody can aim at.
"""

import _socket
import os
import struct

from ..errors import CollectorError
from ..features import log2_q8
from . import bpf
from .bpf import FP, R0, R1, R2, R3, R4, R5, R6, R7, R8, R9
from .cgroup_id import CgroupId, cgroup_root

SYN_OUT, SYNACK_IN, RST_IN, OVERFLOW_OUT, OVERFLOW_IN, OWN_OUT, OWN_IN = range(7)
MAX_EXCLUDED = 4  # addresses of the agent's own broker
MAX_PEERS = 512

# Header, byte offsets
_EPOCH_AT = 0  # which bank the programs write: 0 or 1
_COUNTERS_AT = 8
_ONLY_AT = 72  # the id of the only cgroup that counts
_EXCLUDED_AT = 128  # MAX_EXCLUDED times (port u64, address 16 bytes), the first port of 0 ends them
_INTERFACES_AT = 256  # a bit for each interface index that counts; bit 0 is for all beyond the last
_INTERFACES = 4096
_LOOPBACK_INDEX = 1  # in every network namespace
_BANKS_AT = 4096
# Bank, byte offsets
_BANK_SHIFT = 15
_PEER_BITS_AT = 0
_PORT_BITS_AT = 2048
_ENTRIES_AT = 2560
_PEER_BITS, _PORT_BITS = 14, 12  # 2^14 bits for peers, 2^12 for ports
_WAYS = 8
_SETS = MAX_PEERS // _WAYS
_ENTRY = 48  # hash u64, sent u64, received u64, address 16 bytes, opened u64
_OPENED = 40
OPENED_UDP, OPENED_TCP = 1, 2  # an outward datagram came before any inward packet; an outward SYN without ACK
_PACKETS_SHIFT = 40  # a traffic word: packets in the upper 24 bits, bytes in the lower 40
_SIZE = _BANKS_AT + (2 << _BANK_SHIFT)

# struct __sk_buff (linux/bpf.h)
_SKB_LEN, _SKB_PROTOCOL, _SKB_IFINDEX, _SKB_DATA, _SKB_DATA_END = 0, 16, 40, 76, 80
_ETH_P_IP, _ETH_P_IPV6 = 0x0800, 0x86DD  # in network order
_TCP, _UDP = 6, 17
_FLAG_SYN, _FLAG_RST, _FLAG_ACK = 2, 4, 16

# Stack, offsets from FP
_PORT, _FLAGS, _SERVICE = -8, -16, -24

_MAPPED = int.from_bytes(b"\0\0\xff\xff\0\0\0\0", "little")  # what precedes an IPv4 address in ::ffff:a.b.c.d

# Odd multipliers: 2^64 over the golden ratio (Knuth 6.4), and the first of MurmurHash3's fmix64.
_GOLDEN, _MURMUR = 0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD


class Connections:
    """After read(): `counters`, cumulative, by the names above; and for the time since the last read `peers`, a list of
    (address 16 bytes, sent, received), `distinct_peers`, `distinct_ports`. What was sent and received, also by the
    OVERFLOW and OWN counters, is (packets << 40) + bytes; packets() and octets() take it apart. services: the Services
    whose packets count by themselves, too.

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
        self._memory = bpf.Memory(_SIZE, "stonechat_net")
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
        end = _EXCLUDED_AT + 24 * MAX_EXCLUDED
        self._memory.bytes[_EXCLUDED_AT:end] = rows.ljust(24 * MAX_EXCLUDED, b"\0")

    def read(self) -> None:
        words = self._memory.words
        if self._interfaces is not None:
            self._choose_interfaces()  # one that was taken away and comes back has a new index
        self._choose_cgroup()
        epoch = words[_EPOCH_AT // 8]
        words[_EPOCH_AT // 8] = epoch ^ 1
        bank = _BANKS_AT + (epoch << _BANK_SHIFT)
        first = _COUNTERS_AT // 8
        self.counters[:] = words[first : first + len(self.counters)].tolist()
        bits = self._memory.bytes
        self.distinct_ports = distinct(bits[bank + _PORT_BITS_AT : bank + _ENTRIES_AT])
        self.distinct_peers = distinct(bits[bank + _PEER_BITS_AT : bank + _PORT_BITS_AT])
        self.peers = self._entries(bank + _ENTRIES_AT)
        used = _ENTRIES_AT + MAX_PEERS * _ENTRY
        bits[bank : bank + used] = bytes(used)

    def close(self) -> None:
        for link in self._links:
            os.close(link)
        self._links = []
        self._memory.close()

    def _entries(self, at: int) -> list:
        step = _ENTRY // 8
        hashes = self._memory.words[at // 8 : at // 8 + MAX_PEERS * step : step].tolist()
        found = []
        self.opened = {}
        for i, key in enumerate(hashes):
            if key:
                row = struct.unpack_from("=QQ16sQ", self._memory.bytes, at + i * _ENTRY + 8)
                sent, received, address, opened = row
                found.append((address, sent, received))
                if opened:
                    self.opened[address] = opened
        return found

    def _choose_cgroup(self) -> None:
        if self._only is not None:
            self._memory.words[_ONLY_AT // 8] = self._only.refresh()

    def _choose_interfaces(self) -> None:
        bits = bytearray(_INTERFACES // 8)
        for name in self._interfaces or ():
            try:
                index = _socket.if_nametoindex(name)
            except OSError:
                continue  # not there yet, or not any more
            index = index if index < _INTERFACES else 0
            bits[index >> 3] |= 1 << (index & 7)
        self._memory.bytes[_INTERFACES_AT : _INTERFACES_AT + len(bits)] = bytes(bits)

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
        """R6 the packet, later the bank; R7 its length; R2 and R3 the peer's address; R8 where the transport header
        starts, later the peer's hash; R9 the protocol. On the stack: the peer's port and the TCP flags. Headers are
        read where they lie, which is in the linear part of every packet that comes from or goes to a socket."""
        p = bpf.Program()
        p.copy(R6, R1)
        p.load(4, R7, R6, _SKB_LEN)
        self._skip_other_interfaces(p)
        self._skip_other_cgroups(p)
        self._skip_own_user(p)
        if self._services is not None:
            self._services.find_packet(p, _SERVICE)
        self._read_network_header(p, outward)
        self._read_transport_header(p, outward)
        self._skip_excluded(p)
        if self._services is not None:
            self._services.count_packet(p, outward, _SERVICE, _FLAGS)
        self._hash_address(p)
        self._choose_bank(p)
        if outward:
            self._mark_bit(p, _PEER_BITS_AT, _PEER_BITS)
        self._count_peer(p, outward)
        if outward:
            self._count_outward(p)
        else:
            self._count_inward(p)
        p.goto("pass")
        self._count_own(p, outward)
        p.label("pass")
        p.move(R0, 1)
        p.exit()
        return p

    def _skip_other_interfaces(self, p: bpf.Program) -> None:
        p.load(4, R1, R6, _SKB_IFINDEX)
        if self._interfaces is None:
            p.jump("eq", R1, _LOOPBACK_INDEX, "pass")
            return
        p.jump("lt", R1, _INTERFACES, "indexed")
        p.move(R1, 0)
        p.label("indexed")
        p.copy(R2, R1)
        p.alu("and", R2, 7)
        p.alu("shr", R1, 3)
        p.map_value(R3, self._memory.fd, _INTERFACES_AT)
        p.alu_reg("add", R3, R1)
        p.load(1, R4, R3)
        p.alu_reg("shr", R4, R2)
        p.alu("and", R4, 1)
        p.jump("eq", R4, 0, "pass")

    def _skip_other_cgroups(self, p: bpf.Program) -> None:
        if self._only is not None:
            p.copy(R1, R6)
            p.move(R2, self._only.level)
            p.call(bpf.SKB_ANCESTOR_CGROUP_ID)
            p.map_value(R1, self._memory.fd, _ONLY_AT)
            p.load(8, R1, R1)
            p.jump_reg("ne", R0, R1, "pass")

    def _skip_own_user(self, p: bpf.Program) -> None:
        if self.own_user_id is not None:
            p.copy(R1, R6)
            p.call(bpf.SOCKET_UID)
            p.alu("shl", R0, 32)
            p.alu("shr", R0, 32)
            p.constant(R1, self.own_user_id)
            p.jump_reg("eq", R0, R1, "own")

    def _read_network_header(self, p: bpf.Program, outward: bool) -> None:
        """R2, R3 = the peer's address in 16 bytes (IPv4 as ::ffff:a.b.c.d), R9 = the protocol, R8 = the transport
        header, R5 = the end of what can be read."""
        p.load(4, R1, R6, _SKB_PROTOCOL)
        p.load(4, R8, R6, _SKB_DATA)
        p.load(4, R5, R6, _SKB_DATA_END)
        p.big_endian(R1, 16)
        p.jump("eq", R1, _ETH_P_IP, "ipv4")
        p.jump("ne", R1, _ETH_P_IPV6, "pass")
        self._skip_shorter(p, 40, "pass")
        p.load(1, R9, R8, 6)
        first = 24 if outward else 8
        self._load_unaligned(p, R2, first)
        self._load_unaligned(p, R3, first + 8)
        p.alu("add", R8, 40)
        p.goto("addressed")
        p.label("ipv4")
        self._skip_shorter(p, 20, "pass")
        p.load(1, R9, R8, 9)
        p.load(4, R3, R8, 16 if outward else 12)
        p.alu("shl", R3, 32)
        p.constant(R2, _MAPPED)
        p.alu_reg("or", R3, R2)
        p.move(R2, 0)
        p.load(1, R1, R8)
        p.alu("and", R1, 15)
        p.alu("shl", R1, 2)
        p.alu_reg("add", R8, R1)
        p.label("addressed")

    def _read_transport_header(self, p: bpf.Program, outward: bool) -> None:
        """Ports of TCP and UDP, flags of TCP; zero for anything else and for a header that is cut short."""
        p.store_value(8, FP, _PORT, 0)
        p.store_value(8, FP, _FLAGS, 0)
        p.jump("eq", R9, _TCP, "tcp")
        p.jump("ne", R9, _UDP, "read")
        self._skip_shorter(p, 8, "read")
        p.goto("port")
        p.label("tcp")
        self._skip_shorter(p, 14, "read")
        p.load(1, R1, R8, 13)
        p.store(8, FP, _FLAGS, R1)
        p.label("port")
        p.load(2, R1, R8, 2 if outward else 0)
        p.big_endian(R1, 16)
        p.store(8, FP, _PORT, R1)
        p.label("read")

    def _skip_shorter(self, p: bpf.Program, size: int, label: str) -> None:
        """goto label unless `size` bytes can be read at R8."""
        p.copy(R1, R8)
        p.alu("add", R1, size)
        p.jump_reg("gt", R1, R5, label)

    def _load_unaligned(self, p: bpf.Program, dst: int, offset: int) -> None:
        p.load(4, dst, R8, offset + 4)
        p.alu("shl", dst, 32)
        p.load(4, R1, R8, offset)
        p.alu_reg("or", dst, R1)

    def _skip_excluded(self, p: bpf.Program) -> None:
        p.load(8, R5, FP, _PORT)
        p.map_value(R4, self._memory.fd, _EXCLUDED_AT)
        for i in range(MAX_EXCLUDED):
            p.load(8, R1, R4, 24 * i)
            p.jump("eq", R1, 0, "foreign")
            p.jump_reg("ne", R1, R5, "not_%d" % i)
            p.load(8, R1, R4, 24 * i + 8)
            p.jump_reg("ne", R1, R2, "not_%d" % i)
            p.load(8, R1, R4, 24 * i + 16)
            p.jump_reg("eq", R1, R3, "own")
            p.label("not_%d" % i)
        p.label("foreign")

    def _hash_address(self, p: bpf.Program) -> None:
        """R8 = hash of R2 and R3, never 0."""
        p.constant(R8, self._seeds[0])
        p.alu_reg("xor", R8, R2)
        p.constant(R4, _GOLDEN)
        p.alu_reg("mul", R8, R4)
        self._fold(p)
        p.alu_reg("xor", R8, R3)
        self._scramble(p)
        self._fold(p)
        p.alu("or", R8, 1)

    def _scramble(self, p: bpf.Program) -> None:
        """R8 = a hash of R8 whose upper bits are even where R8 counts up: seed, then fold and multiply twice."""
        p.constant(R4, self._seeds[1])
        p.alu_reg("xor", R8, R4)
        self._fold(p)
        p.constant(R4, _MURMUR)
        p.alu_reg("mul", R8, R4)
        self._fold(p)
        p.constant(R4, _GOLDEN)
        p.alu_reg("mul", R8, R4)

    def _fold(self, p: bpf.Program) -> None:
        p.copy(R1, R8)
        p.alu("shr", R1, 32)
        p.alu_reg("xor", R8, R1)

    def _choose_bank(self, p: bpf.Program) -> None:
        p.map_value(R1, self._memory.fd, _EPOCH_AT)
        p.load(8, R1, R1)
        p.alu("and", R1, 1)
        p.alu("shl", R1, _BANK_SHIFT)
        p.map_value(R6, self._memory.fd, _BANKS_AT)
        p.alu_reg("add", R6, R1)

    def _mark_bit(self, p: bpf.Program, at: int, width: int) -> None:
        """Set the bit that the top `width` bits of R8 name. Looks first: most bits are set already, and a store would
        make the other CPUs fetch the line again."""
        p.copy(R1, R8)
        p.alu("shr", R1, 64 - width)
        p.copy(R0, R1)
        p.alu("and", R0, 7)
        p.alu("shr", R1, 3)
        p.alu_reg("add", R1, R6)
        p.move(R4, 1)
        p.alu_reg("shl", R4, R0)
        p.load(1, R0, R1, at)
        p.jump_reg("set", R0, R4, "marked_%d" % at)
        p.alu_reg("or", R0, R4)
        p.store(1, R1, at, R0)
        p.label("marked_%d" % at)

    def _count_peer(self, p: bpf.Program, outward: bool) -> None:
        """Find the entry of hash R8 among those of its set, or take an empty one. One atomic add counts the packet
        in the upper bits of a word and its bytes in the lower ones."""
        p.copy(R1, R8)
        p.alu("and", R1, 2 * _SETS - 2)  # the lowest bit is always 1
        p.alu("mul", R1, _WAYS * _ENTRY // 2)
        p.alu_reg("add", R1, R6)
        p.alu("add", R1, _ENTRIES_AT)
        p.constant(R4, 1 << _PACKETS_SHIFT)
        p.alu_reg("or", R7, R4)
        for way in range(_WAYS):
            p.load(8, R0, R1)
            p.jump_reg("eq", R0, R8, "found")
            p.jump("eq", R0, 0, "empty")
            if way < _WAYS - 1:
                p.alu("add", R1, _ENTRY)
        p.map_value(R1, self._memory.fd, _COUNTERS_AT)
        p.atomic_add(R1, 8 * (OVERFLOW_OUT if outward else OVERFLOW_IN), R7)
        p.goto("counted")
        p.label("empty")
        p.store(8, R1, 0, R8)
        p.store(8, R1, 24, R2)
        p.store(8, R1, 32, R3)
        if outward:
            p.jump("ne", R9, _UDP, "found")
            p.store_value(8, R1, _OPENED, OPENED_UDP)
        p.label("found")
        p.atomic_add(R1, 8 if outward else 16, R7)
        if outward:
            p.load(8, R0, FP, _FLAGS)
            p.alu("and", R0, _FLAG_SYN | _FLAG_ACK)
            p.jump("ne", R0, _FLAG_SYN, "counted")
            p.store_value(8, R1, _OPENED, OPENED_TCP)
        p.label("counted")

    def _count_outward(self, p: bpf.Program) -> None:
        """SYN without ACK; its destination port, and that of UDP, among the distinct ones."""
        p.jump("eq", R9, _UDP, "destination")
        p.load(8, R0, FP, _FLAGS)
        p.alu("and", R0, _FLAG_SYN | _FLAG_ACK)
        p.jump("ne", R0, _FLAG_SYN, "pass")
        self._count_one(p, SYN_OUT)
        p.label("destination")
        p.load(8, R8, FP, _PORT)
        self._scramble(p)
        self._mark_bit(p, _PORT_BITS_AT, _PORT_BITS)

    def _count_inward(self, p: bpf.Program) -> None:
        p.load(8, R0, FP, _FLAGS)
        p.jump("set", R0, _FLAG_RST, "reset")
        p.alu("and", R0, _FLAG_SYN | _FLAG_ACK)
        p.jump("ne", R0, _FLAG_SYN | _FLAG_ACK, "pass")
        self._count_one(p, SYNACK_IN)
        p.goto("pass")
        p.label("reset")
        self._count_one(p, RST_IN)

    def _count_one(self, p: bpf.Program, counter: int) -> None:
        p.map_value(R1, self._memory.fd, _COUNTERS_AT)
        p.move(R4, 1)
        p.atomic_add(R1, 8 * counter, R4)

    def _count_own(self, p: bpf.Program, outward: bool) -> None:
        p.label("own")
        p.constant(R4, 1 << _PACKETS_SHIFT)
        p.alu_reg("or", R7, R4)
        p.map_value(R1, self._memory.fd, _COUNTERS_AT)
        p.atomic_add(R1, 8 * (OWN_OUT if outward else OWN_IN), R7)


def packets(traffic: int) -> int:
    return traffic >> _PACKETS_SHIFT


def octets(traffic: int) -> int:
    return traffic & (1 << _PACKETS_SHIFT) - 1


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
