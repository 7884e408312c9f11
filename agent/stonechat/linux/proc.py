"""What any process may read under /proc, as the counters of LINUX_PROC_1: no capability, no pip package.

Files are opened once and read with pread: opening costs two to six times the read. Every counter is accumulated here,
source by source, so that an interface that comes, goes or starts anew, and a 32-bit counter that wraps, never shows up
as a jump.

ip_out_unattrib = IP packets sent - TCP segments - TCP retransmissions - UDP - ICMP, over IPv4 and IPv6: what raw
sockets sent, the only trace that a raw SYN scan leaves without BPF. TcpOutSegs includes the resets (checked on 6.18:
100 refused connects on loopback give OutRequests 200, OutSegs 200, OutRsts 100). Segmentation offload makes the kernel
count more TCP segments than IP packets, so beside a bulk upload the figure reads low; it never goes below zero.
"""

from ..errors import CollectorError
from . import schemas
from .sock_diag import NetlinkListeners, TableListeners
from .sources import Growth, Part, keyed, number, open_if_there

MAX_INTERFACES = 64  # containers bring a veth each; those beyond are left out, and .sources says so
_FULL_SHARE_Q8 = 25600

_NET_FIX = "a kernel with CONFIG_INET, and /proc mounted with its net folder (systemd: no ProcSubset=pid)"

_SNMP_KEYS = (
    (b"Tcp:", b"ActiveOpens"),
    (b"Tcp:", b"PassiveOpens"),
    (b"Tcp:", b"AttemptFails"),
    (b"Tcp:", b"EstabResets"),
    (b"Tcp:", b"OutRsts"),
    (b"Tcp:", b"RetransSegs"),
    (b"Tcp:", b"OutSegs"),
    (b"Udp:", b"InDatagrams"),
    (b"Udp:", b"OutDatagrams"),
    (b"Udp:", b"NoPorts"),
    (b"Icmp:", b"InDestUnreachs"),
    (b"Icmp:", b"OutMsgs"),
    (b"Ip:", b"OutRequests"),
    (b"Ip:", b"ForwDatagrams"),
)
_SNMP6_KEYS = (
    b"Udp6InDatagrams ",
    b"Udp6OutDatagrams ",
    b"Udp6NoPorts ",
    b"Icmp6InDestUnreachs ",
    b"Icmp6OutMsgs ",
    b"Ip6OutRequests ",
    b"Ip6OutForwDatagrams ",
)
_VMSTAT_KEYS = (b"pgfault ", b"nr_dirtied ", b"pgpgin ", b"pgpgout ")


class Interfaces(Part):
    """/proc/net/dev. names: those to count, None for all but `lo`."""

    group = "bandwidth"
    source = "/proc/net/dev"
    fix = _NET_FIX

    def __init__(self, proc: str, names: "tuple[str, ...] | list[str] | None" = None) -> None:
        super().__init__(proc)
        self._names = None if names is None else frozenset(name.encode() for name in names)
        self._growth: dict[bytes, Growth] = {}
        self._totals = [0] * 4  # bytes and packets in, bytes and packets out
        self._mean_out_bytes = 0
        self._left_out = 0
        self._push_all()
        self.note = self._note()

    def fill(self, values: list[int], at: int) -> None:
        before_bytes, before_pkts = self._totals[2:]
        self._push_all()
        bytes_in, pkts_in, bytes_out, pkts_out = self._totals
        if pkts_out > before_pkts:  # a window that sent nothing has no sizes: the last mean is kept
            self._mean_out_bytes = (bytes_out - before_bytes) // (pkts_out - before_pkts)
        values[at : at + 5] = (bytes_in, bytes_out, pkts_in, pkts_out, self._mean_out_bytes)

    def _push_all(self) -> None:
        seen: dict[bytes, Growth] = {}
        self._left_out = 0
        for line in self._file.read().split(b"\n")[2:]:
            head, colon, text = line.rpartition(b":")  # the figures hold none, an alias (eth0:1) does
            name = head.strip()
            if not colon or not (name != b"lo" if self._names is None else name in self._names):
                continue
            if len(seen) == MAX_INTERFACES:
                self._left_out += 1
                continue
            fields = text.split(None, 10)
            growth = seen[name] = self._growth.get(name) or Growth(4)  # a new one only primes
            growth.push([int(fields[0]), int(fields[1]), int(fields[8]), int(fields[9])])
            self._totals = list(map(int.__add__, self._totals, growth.deltas))
        self._growth = seen

    @property
    def lacks(self) -> str:  # type: ignore[override]
        """The interfaces that were asked for and are not there."""
        if self._names is None or len(self._growth) == len(self._names):
            return ""
        missing = sorted(name.decode() for name in self._names if name not in self._growth)
        return "interface " + ", ".join(missing)

    def _note(self) -> str:
        counted = b", ".join(sorted(self._growth)).decode("ascii", "replace") or "none is up yet"
        missing = ", ".join(sorted(name.decode() for name in (self._names or ()) if name not in self._growth))
        note = "counts " + counted + ("; not there yet: " + missing if missing else "")
        return note + ("; %d more left out" % self._left_out if self._left_out else "")


class Protocols(Part):
    """/proc/net/snmp, and snmp6 where the kernel speaks IPv6. TCP counts both families in the first."""

    group = "protocols"
    source = "/proc/net/snmp"
    fix = _NET_FIX

    def __init__(self, proc: str) -> None:
        super().__init__(proc)
        self._file6 = open_if_there(proc + "/net/snmp6")
        self.note = "IPv4 and IPv6" if self._file6 else "IPv4 only: this kernel or namespace has no IPv6"
        names = _snmp_names(self._file.read())
        self._columns = [(row, _column(names, row, key)) for row, key in _SNMP_KEYS]
        self._established = _column(names, b"Tcp:", b"CurrEstab")
        # Until OutTransmits appeared (Linux 6.8, from its source), OutRequests counted forwarded packets as well.
        self._forwarded_too = b"OutTransmits" not in names[b"Ip:"]
        self._four = Growth(len(_SNMP_KEYS))
        self._six = Growth(len(_SNMP6_KEYS))
        self._unattributed = 0

    def fill(self, values: list[int], at: int) -> None:
        rows = {}
        for line in self._file.read().split(b"\n"):
            if line.startswith((b"Tcp: ", b"Udp: ", b"Icmp: ", b"Ip: ")):
                fields = line.split()
                rows[fields[0]] = fields  # a row's names come first, its numbers overwrite them
        self._four.push([int(rows[row][column]) for row, column in self._columns])
        if self._file6:
            self._six.push(keyed(self._file6, _SNMP6_KEYS))
        self._unattributed += self._raw_packets()
        four = self._four.totals
        six = self._six.totals
        values[at : at + 6] = four[:6]
        values[at + 6] = four[7] + six[0]
        values[at + 7] = four[8] + six[1]
        values[at + 8] = four[9] + six[2]
        values[at + 9] = four[10] + six[3]
        values[at + 10] = self._unattributed
        values[at + 11] = int(rows[b"Tcp:"][self._established])

    def close(self) -> None:
        self._file.close()
        if self._file6:
            self._file6.close()

    def _raw_packets(self) -> int:
        four = self._four.deltas
        six = self._six.deltas
        sent = four[12] + six[5]
        if self._forwarded_too:
            sent -= four[13] + six[6]
        return max(0, sent - four[5] - four[6] - four[8] - four[11] - six[1] - six[4])


class Listeners(Part):
    """Listening ports: sock_diag, or the head of /proc/net/tcp where the kernel has no INET_DIAG."""

    group = "listeners"
    fix = "load the module inet_diag (modprobe tcp_diag), or mount /proc with its net folder"

    def __init__(self, proc: str) -> None:
        self.note = "LISTEN only"
        self._table: NetlinkListeners | TableListeners
        try:
            if proc != "/proc":
                raise OSError("not the running kernel's /proc")
            self._table = NetlinkListeners()
            self._table.count()
        except OSError as error:
            self._table = TableListeners(proc)
            self.note = "no sock_diag (%s), so up to 2 ms a read" % error
            self.better = "modprobe tcp_diag"
        self.source = self._table.source

    def fill(self, values: list[int], at: int) -> None:
        values[at] = self._table.count()

    def close(self) -> None:
        self._table.close()


class Processor(Part):
    """/proc/stat. Busy is all but idle and waiting for a disk; what a hypervisor stole counts for neither."""

    group = "cpu"
    source = "/proc/stat"

    def __init__(self, proc: str) -> None:
        super().__init__(proc)
        self._ticks = [0] * 7
        self._share_q8 = 0
        self._growth = Growth(2)

    def fill(self, values: list[int], at: int) -> None:
        text = self._file.read()
        fields = text[: text.index(b"\n")].split(None, 8)
        ticks = [int(field) for field in fields[1:8]]  # user nice system idle iowait irq softirq
        spent = [max(0, new - old) for new, old in zip(ticks, self._ticks)]  # iowait is known to step back
        self._ticks = ticks
        total = sum(spent)
        if total:
            self._share_q8 = _FULL_SHARE_Q8 * (total - spent[3] - spent[4]) // total
        self._growth.push([number(text, b"ctxt ", self._file.path), number(text, b"processes ", self._file.path)])
        values[at] = self._share_q8
        values[at + 1 : at + 3] = self._growth.totals


class Memory(Part):
    """/proc/meminfo: what programs could still get, as a share of all."""

    group = "memory"
    source = "/proc/meminfo"
    fix = "mount /proc whole (systemd: no ProcSubset=pid), on Linux 3.14 or later"

    def fill(self, values: list[int], at: int) -> None:
        total, available = keyed(self._file, (b"MemTotal:", b"MemAvailable:"))
        values[at] = _FULL_SHARE_Q8 * available // max(1, total)


class Paging(Part):
    """/proc/vmstat: page faults, pages dirtied, KiB read and written."""

    group = "paging"
    source = "/proc/vmstat"
    fix = "mount /proc whole (systemd: no ProcSubset=pid), on a kernel with CONFIG_VM_EVENT_COUNTERS"

    def __init__(self, proc: str) -> None:
        super().__init__(proc)
        self._growth = Growth(len(_VMSTAT_KEYS))

    def fill(self, values: list[int], at: int) -> None:
        self._growth.push(keyed(self._file, _VMSTAT_KEYS))
        values[at : at + 4] = self._growth.totals


class ProcCollector:
    """Fills LINUX_PROC_1, or the first columns of a schema that begins with its columns.

    interfaces: names to count, None for all but `lo`; one that is not there yet is counted once it appears.
    disks: block devices (mmcblk0) or partitions to count reads and writes of, None for the whole machine's.
    proc: where procfs is mounted. `sources`: (group, source, note) for each group of columns.
    Raises CollectorError when a group has no source, naming each with its reason and the fix."""

    def __init__(
        self,
        interfaces: "tuple[str, ...] | list[str] | None" = None,
        proc: str = "/proc",
        disks: "tuple[str, ...] | list[str] | None" = None,
    ) -> None:
        self.schema = schemas.LINUX_PROC_1
        started, failed = start(interfaces, proc, disks)
        self.sources = tuple((part.group, part.source, part.note) for part, _ in started)
        self._parts = tuple(started)
        if failed:
            self.close()
            raise CollectorError("; ".join("%s: %s (fix: %s)" % row for row in failed))

    def read(self, values: list[int]) -> None:
        """values: a list of at least len(schema) ints, whose first len(schema) are filled: cumulative for RATE, the
        reading for LEVEL and SHARE. Raises CollectorError or OSError; then `values` is not to be used."""
        try:
            for part, at in self._parts:
                part.fill(values, at)
        except (ValueError, KeyError, IndexError) as error:
            raise CollectorError("%s does not read as expected: %r" % (part.source, error))

    @property
    def lacks(self) -> str:
        """What was asked for and is not there; it counts once it appears."""
        return "; ".join([text for text in [part.lacks for part, _ in self._parts] if text])

    def close(self) -> None:
        for part, _ in self._parts:
            part.close()


# Each part of the collector, and the column at which what it fills begins.
PARTS: "tuple[tuple[type[Part], int], ...]" = (
    (Protocols, 0),
    (Listeners, 12),
    (Interfaces, 13),
    (Processor, 18),
    (Memory, 21),
    (Paging, 22),
)
_DISKS_AT = 24  # over what Paging filled in there


def start(
    interfaces: "tuple[str, ...] | list[str] | None" = None,
    proc: str = "/proc",
    disks: "tuple[str, ...] | list[str] | None" = None,
) -> "tuple[list[tuple[Part, int]], list[tuple[str, str, str]]]":
    """-> ([(part, first column), ...] of the parts that gave a first reading, [(group, reason, fix), ...] of the
    others). The caller closes the parts; the doctor shows both lists."""
    started: list[tuple[Part, int]] = []
    failed: list[tuple[str, str, str]] = []
    values = [0] * len(schemas.LINUX_PROC_1)
    parts = [(kind, (interfaces,) if kind is Interfaces else (), at) for kind, at in PARTS]
    if disks is not None:
        from .disks import Disks

        parts.append((Disks, (disks,), _DISKS_AT))
    for kind, choice, at in parts:
        try:
            part = kind(proc, *choice)
            part.fill(values, at)
            started.append((part, at))
        except OSError as error:
            failed.append((kind.group, "%s: %s" % (error.filename or kind.source, error.strerror or error), kind.fix))
        except CollectorError as error:
            failed.append((kind.group, str(error), kind.fix))
        except (ValueError, KeyError, IndexError) as error:
            failed.append((kind.group, "%s does not read as expected: %r" % (kind.source, error), kind.fix))
    return started, failed


def _snmp_names(text: bytes) -> "dict[bytes, list[bytes]]":
    names: dict[bytes, list[bytes]] = {}
    for line in text.split(b"\n"):
        fields = line.split()
        if fields:
            names.setdefault(fields[0], fields)  # the first of a row's two lines has its names
    return names


def _column(names: "dict[bytes, list[bytes]]", row: bytes, key: bytes) -> int:
    try:
        return names[row].index(key)
    except (KeyError, ValueError):
        raise CollectorError("/proc/net/snmp has no %s %s" % (row.decode(), key.decode()))
