"""The Linux collector: the best sources that start here; its schema shows which.

LINUX_1 needs every BPF group; where one does not start, the whole collector is LINUX_PROC_1, never a mixture, and
`sources` states what did not start, why, and the fix. BPF, ctypes and mmap are not imported where BPF is not wanted.
"""

from ..errors import CollectorError
from . import schemas
from .cgroup_id import GONE, CgroupId
from .known_peers import KNOWN_AFTER, peers_key
from .proc import ProcCollector
from .tcp_table import TcpContacts

_MOST_LACKED = 26  # characters in the status,
_MOST_LACKS = 4  # of at most this number of things: a status holds limits.SOURCES
_LINK_HEADER = 14  # bytes of Ethernet, which interfaces count and the programs, one layer higher, do not


class LinuxCollector:
    """interfaces: names to count, None for all but `lo`; peers_secret: bytes of this device that key the learned peers
    (None: random, so that what is learned does not outlive this process); use_bpf: True (raise CollectorError where it
    does not start), False, or "auto".

    disks: block devices or partitions whose writes count, None for all. cgroup: a cgroup v2 folder to watch instead of
    the whole machine (a container, a slice, a recording beside other work): the system calls, connections, programs,
    CPU time and memory of its processes and of those below it, and what they write where there is io.stat (else name
    its `disks`). The counters of the interfaces and of /proc/net are those of its network namespace if the agent runs
    in it, else the machine's. Needs BPF: CollectorError where that does not start. own_user_id: the user that the agent
    will become, whose connections are its own; None: the present one unless root.

    services: units or cgroups that are counted by themselves, too (services.py); `services` has a collector for each,
    brought up to date by read(). Needs BPF as well.

    schema: LINUX_1 or LINUX_PROC_1. sources: a tuple of (group, source, note)."""

    most_peers = 256

    def __init__(
        self,
        interfaces: "tuple[str, ...] | list[str] | None" = None,
        peers_secret: "bytes | None" = None,
        use_bpf: "bool | str" = "auto",
        cgroup: "str | None" = None,
        own_user_id: "int | None" = None,
        disks: "tuple[str, ...] | list[str] | None" = None,
        services: "tuple[str, ...] | list[str]" = (),
    ) -> None:
        if cgroup is not None and use_bpf is False:
            raise CollectorError("cgroup %s: watching one cgroup needs BPF" % cgroup)
        if services and use_bpf is False:
            raise CollectorError("[collector] services needs BPF: a model for linux-1, and bpf not false")
        self._proc = ProcCollector(interfaces, disks=disks)
        self._bpf = None
        self._tcp = TcpContacts(peers_key(peers_secret))
        self._cgroup: list = []  # [(column, what reads it)]
        self.schema = schemas.LINUX_PROC_1
        self._sources = self._proc.sources
        self._cgroup_id: "CgroupId | None" = None
        self._cgroup_path = cgroup or ""
        if use_bpf is False:
            return
        try:
            started, rows = start_bpf(interfaces, cgroup, own_user_id, services)
            failed = [(group, "none", note) for group, source, note in rows if not source]
            if failed:
                for part in started:
                    part.close()
                if use_bpf is True or cgroup is not None or services:
                    raise CollectorError("; ".join("%s: %s" % (group, note) for group, _, note in failed))
                self._sources += tuple(failed)
                return
            from .bpf_columns import BpfColumns

            self._bpf = BpfColumns(started, peers_secret)
            if cgroup is not None:
                self._watch_cgroup(cgroup, disks is None)
        except BaseException:
            self.close()
            raise
        self.schema = schemas.LINUX_1
        self._sources += tuple(rows)
        self._scratch = [0] * len(schemas.LINUX_PROC_1)
        names = [column[0] for column in schemas.PROC_COLUMNS]
        kept = [name for name in names if name not in schemas.STAND_INS]
        self._kept = tuple(names.index(name) for name in kept)
        self._traffic = tuple(kept.index(name) for name in ("bytes_in", "pkts_in", "bytes_out", "pkts_out"))
        self._foreign = [0] * 4
        self._forks = kept.index("forks")
        self._cgroup = [(kept.index(name), part) for name, part in self._cgroup]

    def read(self, values: list) -> None:
        """values: a list of len(schema) ints to fill: cumulative for RATE, the reading for LEVEL and SHARE. Raises
        CollectorError or OSError; then `values` is not to be used."""
        if self._bpf is None:
            self._proc.read(values)
            return
        self._proc.read(self._scratch)
        for at, source in enumerate(self._kept):
            values[at] = self._scratch[source]
        self._bpf.fill(values, len(self._kept))
        self._leave_own_out(values, self._bpf.own_traffic())
        if self._cgroup:
            values[self._forks] = self._bpf.forks()
            for at, part in self._cgroup:
                values[at] = part.read()

    @property
    def services(self) -> list:
        """The collectors of the services, in the order in which they were named."""
        return self._bpf.services.collectors if self._bpf is not None and self._bpf.services is not None else []

    def exclude_peer(self, host: str, port: int) -> bool:
        """Leave connections to the agent's own broker out -> whether that is done; False where the name does not
        resolve (yet). Not needed, and nothing is done, where own_user_id identifies the agent's connections: others of
        this device may talk to the same broker."""
        return self._bpf is None or self._bpf.exclude_peer(host, port)

    @property
    def warmup_windows(self) -> int:
        """How many windows to let pass before recording or learning: until then every peer is new to a device that has
        learned none."""
        return KNOWN_AFTER if self._bpf is not None and not len(self._bpf.learned) else 0

    @property
    def contacts(self) -> list:
        """The peers that this device has called in the window that was read last, as numbers; without BPF those of
        TCP, read now."""
        return self._tcp.contacts() if self._bpf is None else self._bpf.learned.contacts

    @property
    def sent(self) -> "list | None":
        """The bytes sent to each of `contacts` in the window that was read last; None without BPF, which counts
        them."""
        return self._bpf.sent if self._bpf is not None else None

    @property
    def lacks(self) -> str:
        """What was asked for and is not there at present; it counts once it is. Texts, separated by "; "."""
        texts = [self._proc.lacks]
        if self._cgroup_id is not None and self._cgroup_id.refresh() == GONE:
            texts.append("cgroup " + self._cgroup_path)
        texts += ["service " + each.name for each in self.services if each.missing]
        return "; ".join([text for text in texts if text])

    @property
    def sources(self) -> tuple:
        """(group, source, note) of each source, and ("lacks", what, "") of what is not there."""
        lacks = self.lacks
        if not lacks:
            return self._sources
        return self._sources + tuple([("lacks", text[:_MOST_LACKED], "") for text in lacks.split("; ")[:_MOST_LACKS]])

    def hold_peers(self, hold: bool) -> None:
        """True while the device is under suspicion: no peer becomes known."""
        if self._bpf is not None:
            self._bpf.learned.hold = hold

    def dump(self) -> bytes:
        """The learned peers, as hashes, for restore() after the next start; empty without BPF."""
        return self._bpf.learned.dump() if self._bpf is not None else b""

    def restore(self, packed: bytes) -> None:
        """Raises CollectorError for anything but what dump() gave."""
        if self._bpf is not None:
            self._bpf.learned.restore(packed)

    def close(self) -> None:
        self._proc.close()
        if self._bpf is not None:
            self._bpf.close()
        for _, part in self._cgroup:
            part.close()

    def _watch_cgroup(self, cgroup: str, with_disk: bool) -> None:
        from .cgroup import CgroupDisk, CgroupMemory, CgroupProcessor

        self._cgroup_id = CgroupId(cgroup)
        self._cgroup.append(("cpu_busy", CgroupProcessor(cgroup)))
        memory = CgroupMemory(cgroup)
        self._cgroup.append(("mem_avail", memory))
        note = "cpu.stat, " + memory.source
        if memory.source != "memory.stat":
            note += " (enable the memory controller, or with systemd ProtectProc=default, which lets it be read)"
        if with_disk:
            disk = CgroupDisk(cgroup)
            if disk.works:
                self._cgroup.append(("disk_written", disk))
                note += ", io.stat"
            else:
                note += "; disk_written is the whole machine's: it has no io.stat (name its disks)"
        self._sources += (("cgroup", "v2", cgroup + ": " + note),)

    def _leave_own_out(self, values: list, own: "tuple[int, int, int, int]") -> None:
        """The interfaces' counters without the agent's own connections. The two are read a moment apart and offloads
        count differently, so that the difference may step back a little: then the last one is kept."""
        bytes_in, pkts_in, bytes_out, pkts_out = own
        theirs = (bytes_in + pkts_in * _LINK_HEADER, pkts_in, bytes_out + pkts_out * _LINK_HEADER, pkts_out)
        for i, at in enumerate(self._traffic):
            self._foreign[i] = max(self._foreign[i], values[at] - theirs[i])
            values[at] = self._foreign[i]


def start_bpf(interfaces=None, cgroup: "str | None" = None, own_user_id: "int | None" = None, services=()):
    """-> ([the groups that started], [(group, source or "", note with reason and fix), ...] of all). The caller closes
    what started. `stonechat doctor` asks here as well."""
    try:
        from . import bpf_columns  # ctypes and mmap come in here
    except ImportError as error:
        reason = "python has no %s; install the full standard library" % error.name
        return [], [("syscalls", "", reason), ("connections", "", reason)]
    return bpf_columns.start(interfaces, cgroup, own_user_id, services)
