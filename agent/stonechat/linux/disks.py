"""Chosen block devices in place of the whole machine's paging: an SD card without the USB disk beside it."""

from .sources import Growth, Part


class Disks(Part):
    """/proc/diskstats. names: the block devices or partitions to count, in KiB read and written. One that is not there
    yet is counted once it appears."""

    group = "disks"
    source = "/proc/diskstats"
    fix = "mount /proc whole (systemd: no ProcSubset=pid)"

    def __init__(self, proc: str, names: "tuple[str, ...] | list[str]") -> None:
        super().__init__(proc)
        self._names = frozenset(name.encode() for name in names)
        self._growth: dict[bytes, Growth] = {}
        self._sectors = [0] * 2  # read, written; of 512 bytes whatever the medium's are
        self._push_all()
        missing = sorted(name.decode() for name in self._names if name not in self._growth)
        self.note = "counts " + (b", ".join(sorted(self._growth)).decode() or "none yet")
        self.note += "; not there yet: " + ", ".join(missing) if missing else ""

    def fill(self, values: list[int], at: int) -> None:
        self._push_all()
        values[at : at + 2] = (self._sectors[0] >> 1, self._sectors[1] >> 1)

    @property
    def lacks(self) -> str:  # type: ignore[override]
        """The disks that were asked for and are not there."""
        missing = sorted(name.decode() for name in self._names if name not in self._growth)
        return "disk " + ", ".join(missing) if missing else ""

    def _push_all(self) -> None:
        seen: dict[bytes, Growth] = {}
        for line in self._file.read().split(b"\n"):
            fields = line.split(None, 10)
            if len(fields) < 10 or fields[2] not in self._names:
                continue
            growth = seen[fields[2]] = self._growth.get(fields[2]) or Growth(2)  # a new one only primes
            growth.push([int(fields[5]), int(fields[9])])
            self._sectors = list(map(int.__add__, self._sectors, growth.deltas))
        self._growth = seen
