"""One cgroup v2 folder in place of the whole machine, for an agent that watches a container, a slice or a recording
beside other work: the processor time, the memory and the disk of its processes and of those in the folders below it.
"""

import os

from ..compat import ticks_diff, ticks_us
from .sources import ProcFile

_WHOLE_Q8 = 25600
MAX_FOLDERS = 256  # looked into for processes; what lies beyond is left out


class CgroupFile:
    """A file of the folder, which goes when the folder is removed and is found again when it is made again."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: ProcFile | None = None
        try:
            self._file = ProcFile(path)  # now: later the agent may be a user that can't open it
        except OSError:
            pass

    def read(self) -> "bytes | None":
        """The text; None while it is not there."""
        for _ in range(2):
            try:
                if self._file is None:
                    self._file = ProcFile(self._path)
                return self._file.read()
            except OSError:  # ENODEV: of a folder that was removed
                self.close()
        return None

    def read_kept(self) -> "bytes | None":
        """The text of the file that was opened before; None where that folder is gone, though another may be there."""
        try:
            return self._file.read() if self._file is not None else None
        except OSError:
            self.close()
            return None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class CgroupProcessor:
    """The share of all CPUs that the folder has used since the last read, in percent Q8; 0 while it is not there."""

    def __init__(self, cgroup: str) -> None:
        self._file = CgroupFile(cgroup + "/cpu.stat")
        self._cpus = os.cpu_count() or 1
        self._last = (0, ticks_us())

    def read(self) -> int:
        text = self._file.read()
        used_us = int(text.split(None, 2)[1]) if text else 0  # usage_usec comes first
        now_us = ticks_us()
        last_used_us, last_us = self._last
        self._last = (used_us, now_us)
        if used_us < last_used_us:  # made again
            last_used_us = 0
        whole_us = max(1, ticks_diff(now_us, last_us)) * self._cpus
        return min(_WHOLE_Q8, _WHOLE_Q8 * (used_us - last_used_us) // whole_us)

    def close(self) -> None:
        self._file.close()


class CgroupMemory:
    """What the folder's processes leave of the machine's memory, in percent Q8: all of it less their anonymous pages,
    which nothing can take from them. From memory.stat where the memory controller is on, else process by process."""

    def __init__(self, cgroup: str, proc: str = "/proc") -> None:
        self._cgroup = cgroup
        self._proc = proc
        self._total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._file = CgroupFile(cgroup + "/memory.stat")
        self.source = "/proc/PID/statm" if self._file.read() is None else "memory.stat"

    def read(self) -> int:
        return max(0, _WHOLE_Q8 - _WHOLE_Q8 * self.used_bytes() // self._total)

    def used_bytes(self) -> int:
        text = self._file.read()
        if text:
            return int(text.split(None, 2)[1])  # anon comes first
        page = os.sysconf("SC_PAGE_SIZE")
        return page * sum([self._anonymous_pages(pid) for pid in processes(self._cgroup)])

    def close(self) -> None:
        self._file.close()

    def _anonymous_pages(self, pid: str) -> int:
        try:
            with open(self._proc + "/" + pid + "/statm", "rb") as file:
                fields = file.read().split()
        except OSError:
            return 0  # it has ended
        return int(fields[1]) - int(fields[2])  # resident, less what is shared with files


class CgroupDisk:
    """KiB that the folder has written since the start, from io.stat."""

    source = "io.stat"

    def __init__(self, cgroup: str) -> None:
        self._file = CgroupFile(cgroup + "/io.stat")
        self.works = os.path.exists(cgroup + "/io.stat") or not os.path.exists(cgroup)
        self._last = 0
        self._total = 0

    def read(self) -> int:
        text = self._file.read()
        if text is not None:
            written = sum([int(word[7:]) for word in text.split() if word.startswith(b"wbytes=")])
            self._total += written - self._last if written >= self._last else written
            self._last = written
        return self._total >> 10

    def close(self) -> None:
        self._file.close()


def processes(cgroup: str) -> "list[str]":
    """The ids of the processes in the folder and below it."""
    found: list[str] = []
    folders = [cgroup]
    for folder in folders:
        try:
            with open(folder + "/cgroup.procs") as file:
                found += file.read().split()
            with os.scandir(folder) as entries:
                below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue  # it went away
        folders += below[: MAX_FOLDERS - len(folders)]
    return found
