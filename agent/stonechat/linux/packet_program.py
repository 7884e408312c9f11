"""The programs that count packets: of type cgroup_skb, one a direction, into one mapped memory.

    header  settings that this process writes, and the counters
    bank    distinct peers and destination ports (each sets one bit of many) and the peers themselves, 512 entries

There are two banks: programs write to one while this process reads and clears the other, turn by turn, so that each
read sees the peers since the last. A full set of entries turns nobody out: packets of peers that find no place are
counted as `overflow`, and their number comes from the bits. So a spray of addresses looks like what it is.

Entries are found by a hash with a random seed that stays in this process, which nobody can aim at.
"""

from . import bpf
from .bpf import FP, R0, R1, R2, R3, R4, R5, R6, R7, R8, R9
from .cgroup_id import CgroupId

SYN_OUT, SYNACK_IN, RST_IN, OVERFLOW_OUT, OVERFLOW_IN, OWN_OUT, OWN_IN = range(7)
MAX_EXCLUDED = 4  # addresses of the agent's own broker
MAX_PEERS = 512

# Header, byte offsets
EPOCH_AT = 0  # which bank the programs write: 0 or 1
COUNTERS_AT = 8
ONLY_AT = 72  # the id of the only cgroup that counts
EXCLUDED_AT = 128  # MAX_EXCLUDED times (port u64, address 16 bytes), the first port of 0 ends them
INTERFACES_AT = 256  # a bit for each interface index that counts; bit 0 is for all beyond the last
INTERFACES = 4096
_LOOPBACK_INDEX = 1  # in every network namespace
BANKS_AT = 4096
# Bank, byte offsets
BANK_SHIFT = 15
PEER_BITS_AT = 0
PORT_BITS_AT = 2048
ENTRIES_AT = 2560
_PEER_BITS, _PORT_BITS = 14, 12  # 2^14 bits for peers, 2^12 for ports
_WAYS = 8
_SETS = MAX_PEERS // _WAYS
ENTRY = 48  # hash u64, sent u64, received u64, address 16 bytes, opened u64
_OPENED = 40
OPENED_UDP, OPENED_TCP = 1, 2  # an outward datagram came before any inward packet; an outward SYN without ACK
PACKETS_SHIFT = 40  # a traffic word: packets in the upper 24 bits, bytes in the lower 40
SIZE = BANKS_AT + (2 << BANK_SHIFT)

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


class PacketProgram:
    """map_fd: the memory. every_interface: all but `lo` count, and the bits in the memory decide nothing. only: the
    cgroup that counts, None for all. own_user_id: sockets of this user count apart. seeds: two random words of 64 bits
    for the hash. services: the Services whose packets count by themselves, too."""

    def __init__(
        self,
        map_fd: int,
        every_interface: bool,
        only: "CgroupId | None",
        own_user_id: "int | None",
        seeds: "tuple[int, int]",
        services=None,
    ) -> None:
        self._map_fd = map_fd
        self._every_interface = every_interface
        self._only = only
        self._own_user_id = own_user_id
        self._seeds = seeds
        self._services = services

    def make(self, outward: bool) -> bpf.Program:
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
            self._mark_bit(p, PEER_BITS_AT, _PEER_BITS)
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
        if self._every_interface:
            p.jump("eq", R1, _LOOPBACK_INDEX, "pass")
            return
        p.jump("lt", R1, INTERFACES, "indexed")
        p.move(R1, 0)
        p.label("indexed")
        p.copy(R2, R1)
        p.alu("and", R2, 7)
        p.alu("shr", R1, 3)
        p.map_value(R3, self._map_fd, INTERFACES_AT)
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
            p.map_value(R1, self._map_fd, ONLY_AT)
            p.load(8, R1, R1)
            p.jump_reg("ne", R0, R1, "pass")

    def _skip_own_user(self, p: bpf.Program) -> None:
        if self._own_user_id is not None:
            p.copy(R1, R6)
            p.call(bpf.SOCKET_UID)
            p.alu("shl", R0, 32)
            p.alu("shr", R0, 32)
            p.constant(R1, self._own_user_id)
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
        p.map_value(R4, self._map_fd, EXCLUDED_AT)
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
        p.map_value(R1, self._map_fd, EPOCH_AT)
        p.load(8, R1, R1)
        p.alu("and", R1, 1)
        p.alu("shl", R1, BANK_SHIFT)
        p.map_value(R6, self._map_fd, BANKS_AT)
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
        p.alu("mul", R1, _WAYS * ENTRY // 2)
        p.alu_reg("add", R1, R6)
        p.alu("add", R1, ENTRIES_AT)
        p.constant(R4, 1 << PACKETS_SHIFT)
        p.alu_reg("or", R7, R4)
        for way in range(_WAYS):
            p.load(8, R0, R1)
            p.jump_reg("eq", R0, R8, "found")
            p.jump("eq", R0, 0, "empty")
            if way < _WAYS - 1:
                p.alu("add", R1, ENTRY)
        p.map_value(R1, self._map_fd, COUNTERS_AT)
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
        self._mark_bit(p, PORT_BITS_AT, _PORT_BITS)

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
        p.map_value(R1, self._map_fd, COUNTERS_AT)
        p.move(R4, 1)
        p.atomic_add(R1, 8 * counter, R4)

    def _count_own(self, p: bpf.Program, outward: bool) -> None:
        p.label("own")
        p.constant(R4, 1 << PACKETS_SHIFT)
        p.alu_reg("or", R7, R4)
        p.map_value(R1, self._map_fd, COUNTERS_AT)
        p.atomic_add(R1, 8 * (OWN_OUT if outward else OWN_IN), R7)
