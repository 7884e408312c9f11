"""What channels of eight services add to the programs, attached and detached in turn in one run: nanoseconds a system
call, and microseconds a window for reading them; an empty program beside both. Figures are medians of the turns, and of
the differences within each turn. Part of `stonechat bench collect`."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stonechat_tools.bench import bpf as loops

TURNS = 20
SERVICES = 8
CALLS_A_SLICE = 200  # 20 us: short enough to escape the other work of a busy machine
SLICES_A_TURN = 400
READS_A_TURN = 40


@contextmanager
def cgroups(n: int = SERVICES) -> Iterator[list[str]]:
    """n cgroups, the last of which this process's children join -> their folders. Raises OSError, CollectorError."""
    from stonechat.linux.cgroup_id import cgroup_root

    parent = Path(tempfile.mkdtemp(prefix=f"stonechat-{os.getpid()}-", dir=cgroup_root()))
    folders = [parent / f"svc{i}.service" for i in range(n)]
    try:
        for folder in folders:
            folder.mkdir()
        yield [str(folder) for folder in folders]
    finally:
        for folder in folders:
            folder.rmdir()
        parent.rmdir()


def measure(turns: int = TURNS) -> dict[str, Any]:
    """-> {"syscall": {...}, "window": {...}}, see the module. Raises CollectorError or OSError where BPF or cgroup v2
    does not start here."""
    with cgroups() as folders:
        return {
            "services": len(folders),
            "turns": turns,
            "syscall": _syscalls(folders, turns),
            "window": _windows(folders, turns),
        }


def _syscalls(folders: list[str], turns: int) -> dict[str, float]:
    """getppid by a process of the last service, the one that is looked for longest."""
    from stonechat.linux.syscalls import Syscalls

    home = _own_cgroup()
    Path(folders[-1], "cgroup.procs").write_text(str(os.getpid()))
    try:
        loop = loops.Loop(_calls)  # its child stays there
    finally:
        home.write_text(str(os.getpid()))
    subjects: dict[str, Callable[[], Any]] = {
        "empty": loops.EmptySyscalls,
        "today": Syscalls,
        "services": lambda: Syscalls(services=folders),
    }
    ns: dict[str, list[float]] = {name: [] for name in ("none", *subjects)}
    try:
        loop.run()
        for _ in range(turns):
            ns["none"].append(_slice_ns(loop))
            for name, attach in subjects.items():
                attached = attach()
                try:
                    ns[name].append(_slice_ns(loop))
                finally:
                    attached.close()
    finally:
        loop.close()
    return _figures(ns, "ns")


def _windows(folders: list[str], turns: int) -> dict[str, float]:
    """CPU of one reading of the collector, with and without services."""
    from stonechat.linux.collector import LinuxCollector

    us: dict[str, list[float]] = {"today": [], "services": []}
    for _ in range(turns):
        for name, wanted in (("today", []), ("services", folders)):
            collector = LinuxCollector(use_bpf=True, services=wanted)
            values = [0] * len(collector.schema)
            channels = [(each, [0] * len(each.schema)) for each in collector.services]
            best_ns = 1 << 62
            try:
                for _ in range(READS_A_TURN):
                    began_ns = time.process_time_ns()
                    collector.read(values)
                    for each, row in channels:
                        each.read(row)
                    best_ns = min(best_ns, time.process_time_ns() - began_ns)
            finally:
                collector.close()
            us[name].append(best_ns / 1000)
    return _figures(us, "us")


def _calls() -> None:
    getppid = os.getppid
    for _ in range(CALLS_A_SLICE):
        getppid()


def _slice_ns(loop: loops.Loop) -> float:
    return min(loop.run() for _ in range(SLICES_A_TURN)) / CALLS_A_SLICE


def _figures(turns: dict[str, list[float]], unit: str) -> dict[str, float]:
    figures = {f"{name}_{unit}": round(statistics.median(values), 1) for name, values in turns.items()}
    added = [b - a for a, b in zip(turns["today"], turns["services"], strict=True)]
    return figures | {f"added_{unit}": round(statistics.median(added), 1)}


def _own_cgroup() -> Path:
    """The cgroup.procs of this process's own cgroup."""
    from stonechat.linux.cgroup_id import cgroup_root

    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return Path(cgroup_root() + line[3:], "cgroup.procs")
    raise OSError("this process is in no cgroup of version 2")
