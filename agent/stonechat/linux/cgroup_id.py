"""Which cgroup the BPF programs count: its id lies in their memory, so that a folder that is removed and made again
(a service that restarts) is found again without any privilege."""

import os

from ..errors import CollectorError

GONE = (1 << 64) - 1  # the id of no cgroup


class CgroupId:
    """path: a folder of cgroup v2, which need not be there yet. `level`: its depth below the mount; `now`: its id, GONE
    while it is not there. Raises CollectorError for a path that does not lie below the mount."""

    def __init__(self, path: str) -> None:
        root = cgroup_root()
        self._path = os.path.realpath(path)
        below = os.path.relpath(self._path, os.path.realpath(root))
        if below.startswith(".."):
            raise CollectorError("cgroup %s does not lie below %s" % (path, root))
        self.level = 0 if below == "." else below.count("/") + 1
        self.now = GONE
        self.refresh()

    def refresh(self) -> int:
        """Look again -> the id, which is the folder's inode number."""
        try:
            self.now = os.stat(self._path).st_ino
        except OSError:
            self.now = GONE
        return self.now


def cgroup_root() -> str:
    """Where cgroup v2 is mounted: /sys/fs/cgroup, or .../unified beside v1. Raises CollectorError."""
    with open("/proc/self/mounts") as file:
        for line in file:
            fields = line.split()
            if fields[2] == "cgroup2":
                return fields[1]
    raise CollectorError("cgroup v2 is not mounted (fix: mount -t cgroup2 none /sys/fs/cgroup/unified)")
