"""Every service its own channel: system calls by class, programs, connections and processor time of up to eight
cgroups, counted by the same BPF programs beside the machine's own counters.

A histogram of the whole machine hides one bad process among twenty; in its own service's it is plain. The programs ask
for the caller's cgroup at the depth of each service and look it up among the ids in their memory, so that a service
that restarts (a new id) is found again without any privilege. Of two services of which one lies inside the other, the
inner one counts.

    byte 0     the ids of the services, GONE for one that is not there
    byte 64    for each service 8 words (u64) of its packets, by all CPUs
    byte 4096  for each CPU and service 32 words: the 16 classes, then exec, fork, exit
"""

import os
from operator import add

from ..errors import ConfigError
from ..features import log2_q8
from . import bpf
from .bpf import FP, R0, R1, R2, R3, R4, R6, R7
from .cgroup import CgroupFile
from .cgroup_id import GONE, CgroupId, cgroup_root
from .schemas import LINUX_SERVICE_1

MAX_SERVICES = 8
MAX_NAME_BYTES = 24  # of a channel's name in the status
SYN_OUT, ACCEPTED, RST_IN, BYTES_OUT, BYTES_IN = range(5)

_NET_AT = 64
_NET_SLOTS = 8
_COUNTS_AT = 4096
_SLOTS = 32
_BLOCK = 8 * _SLOTS
_CALLS = 18  # the classes, exec and fork
_NONE = MAX_SERVICES * _BLOCK  # on the stack in place of a service's offset
_FLAG_SYN, _FLAG_RST, _FLAG_ACK = 2, 4, 16
_MAX_FOLDERS = 2000  # looked into for a unit by its name
_MAX_DEPTH = 4
_TAKEN = ("lasting peers", "sent to peers", "own model")  # names of the agent's other channels,
_COUNTERS = "counters "  # and how that of the product's own begins
_SUFFIXES = (".service", ".slice", ".scope", ".socket", ".mount", ".swap")


class Services:
    """names: up to MAX_SERVICES systemd units ("nginx.service") or folders of cgroup v2, which need not be there yet.
    `collectors`: one ServiceCollector for each, in their order; refresh() brings all of them up to date.

    Raises ConfigError, naming the service; CollectorError or OSError where there is no cgroup v2 or no BPF."""

    def __init__(self, names: "list[str] | tuple[str, ...]", cpus: int) -> None:
        self.cpus = cpus
        root = os.path.realpath(cgroup_root())
        paths = [service_path(name, root) for name in names]
        check_services(names, paths)
        self._ids = [CgroupId(path) for path in paths]
        self.levels = sorted({each.level for each in self._ids}, reverse=True)
        self._memory = bpf.Memory(_COUNTS_AT + cpus * MAX_SERVICES * _BLOCK, "stonechat_svc")
        self.collectors = [ServiceCollector(name, path, each) for name, path, each in zip(names, paths, self._ids)]
        for slot in range(MAX_SERVICES):
            self._memory.words[slot] = self._ids[slot].now if slot < len(names) else GONE

    def refresh(self) -> None:
        """Read what every service has counted. Never fails: it reads memory, and files that may be gone."""
        words = self._memory.words
        n = len(self.collectors)
        first = _COUNTS_AT // 8
        step = MAX_SERVICES * _SLOTS
        counts = words[first : first + n * _SLOTS].tolist()
        for cpu in range(1, self.cpus):
            at = first + cpu * step
            counts = list(map(add, counts, words[at : at + n * _SLOTS].tolist()))
        net = words[_NET_AT // 8 : _NET_AT // 8 + n * _NET_SLOTS].tolist()
        at = net_at = 0
        for slot, collector in enumerate(self.collectors):
            collector.calls = counts[at : at + _CALLS]
            collector.net = net[net_at : net_at + 5]
            at += _SLOTS
            net_at += _NET_SLOTS
            if collector.refresh():
                words[slot] = self._ids[slot].now

    def release_fd(self) -> None:
        self._memory.release_fd()

    def close(self) -> None:
        for collector in self.collectors:
            collector.close()
        self._memory.close()

    # --- parts of the programs ----------------------------------------------------------------------------------------

    def _find(self, p: bpf.Program, helper: int, none: str) -> None:
        """R1 = where the service of the caller (of the packet in R6) begins in a block; goto `none` where it is in
        none. Uses R0 to R5."""
        exact = helper == bpf.CURRENT_CGROUP_ID
        for level in self.levels[:1] if exact else self.levels:
            if helper == bpf.SKB_ANCESTOR_CGROUP_ID:
                p.copy(R1, R6)
                p.move(R2, level)
            elif not exact:
                p.move(R1, level)
            p.call(helper)
            p.map_value(R1, self._memory.fd)
            for slot, each in enumerate(self._ids):
                if exact or each.level == level:
                    p.load(8, R2, R1, 8 * slot)
                    p.jump_reg("eq", R0, R2, "service_%d" % slot)
        p.goto(none)
        for slot in range(len(self._ids)):
            p.label("service_%d" % slot)
            p.move(R1, slot * _BLOCK)
            p.goto("service")
        p.label("service")

    def find_caller(self, p: bpf.Program, helper: int, to: int) -> None:
        """The register `to` = the caller's service, for count_call(). helper: CURRENT_ANCESTOR_CGROUP_ID, or
        CURRENT_CGROUP_ID, which leaves out what is in a cgroup below that of the service."""
        p.move(to, _NONE)
        self._find(p, helper, "no_service")
        p.copy(to, R1)
        p.label("no_service")

    def count_call(self, p: bpf.Program, cpu_at: int) -> None:
        """Add one to the word at byte R7 (0 to 248) of the service in R6; the CPU's number is on the stack at cpu_at.
        Goes on at label "out" where it is in none."""
        p.jump("ge", R6, _NONE, "out")
        p.alu("and", R6, _NONE - _BLOCK)
        p.load(8, R2, FP, cpu_at)
        p.alu("and", R2, self.cpus - 1)
        p.alu("mul", R2, MAX_SERVICES * _BLOCK)
        p.alu_reg("add", R2, R6)
        p.alu("and", R7, _BLOCK - 8)
        p.alu_reg("add", R7, R2)
        p.map_value(R2, self._memory.fd, _COUNTS_AT)
        p.alu_reg("add", R2, R7)
        p.load(8, R3, R2)
        p.alu("add", R3, 1)
        p.store(8, R2, 0, R3)

    def find_packet(self, p: bpf.Program, service_at: int) -> None:
        """Put the service of the packet in R6 on the stack at service_at."""
        p.store_value(8, FP, service_at, _NONE)
        self._find(p, bpf.SKB_ANCESTOR_CGROUP_ID, "no_service")
        p.store(8, FP, service_at, R1)
        p.label("no_service")

    def count_packet(self, p: bpf.Program, outward: bool, service_at: int, flags_at: int) -> None:
        """Count the packet of R7 bytes, with TCP's flags on the stack at flags_at. Uses R0, R1, R4."""
        p.load(8, R1, FP, service_at)
        p.jump("ge", R1, _NONE, "no_service_counts")
        p.alu("and", R1, _NONE - 1)
        p.alu("shr", R1, 2)  # 8 words in place of 32
        p.map_value(R4, self._memory.fd, _NET_AT)
        p.alu_reg("add", R4, R1)
        p.atomic_add(R4, 8 * (BYTES_OUT if outward else BYTES_IN), R7)
        p.load(8, R0, FP, flags_at)
        p.move(R1, 1)
        if outward:
            p.alu("and", R0, _FLAG_SYN | _FLAG_ACK)
            p.jump("eq", R0, _FLAG_SYN, "service_syn")
            p.jump("ne", R0, _FLAG_SYN | _FLAG_ACK, "no_service_counts")
            p.atomic_add(R4, 8 * ACCEPTED, R1)
            p.goto("no_service_counts")
            p.label("service_syn")
            p.atomic_add(R4, 8 * SYN_OUT, R1)
        else:
            p.alu("and", R0, _FLAG_RST)
            p.jump("eq", R0, 0, "no_service_counts")
            p.atomic_add(R4, 8 * RST_IN, R1)
        p.label("no_service_counts")


class ServiceCollector:
    """The collector of one service's channel. `absent`: its cgroup was not there all the time since the last reading;
    then the window shows nothing of it, whatever the counters say."""

    schema = LINUX_SERVICE_1
    sources = ()  # what counts it is what counts the machine

    def __init__(self, name: str, path: str, cgroup_id: CgroupId) -> None:
        self.name = channel_name(name)
        self.path = path
        self.absent = cgroup_id.now == GONE
        self.calls = [0] * _CALLS
        self.net = [0] * 5
        self._id = cgroup_id
        self._file = CgroupFile(path + "/cpu.stat")
        self._used_us = self._last_us = 0

    def refresh(self) -> bool:
        """-> whether it has another id than before, or none: a new folder has files of its own, so that those of the
        last one can't be read any more."""
        known = self._id.now
        text = self._file.read_kept() if known != GONE else None
        if text is None:
            text = self._file.read()
            self._last_us = 0
            self._id.refresh()
        if text:
            used_us = int(text[11 : text.index(b"\n")])  # usage_usec comes first
            self._used_us += max(0, used_us - self._last_us)
            self._last_us = used_us
        self.absent = known == GONE or known != self._id.now
        return known != self._id.now

    @property
    def missing(self) -> bool:
        """Is it not there now?"""
        return self._id.now == GONE

    def read(self, values: list) -> None:
        """values: a list of len(schema) ints to fill, as of the last refresh() of the Services."""
        values[:_CALLS] = self.calls
        values[_CALLS : _CALLS + 5] = self.net
        values[_CALLS + 5] = self._used_us // 1000

    def close(self) -> None:
        self._file.close()


def model_path(path: str, name: str) -> str:
    """path: a model of all services, or a folder that has one for each; name: a channel's -> the model's file."""
    return os.path.join(path, name.rpartition(".")[0] or name, "model.tflite") if os.path.isdir(path) else path


def share_budget(alarm_rules, n: int) -> list:
    """alarm_rules: (allowance, cap, threshold) each in Q8, as a model has them for one service; n services -> those
    that keep its budget of false alarms for all of them together: the threshold rises by 1.16 log10(n).

    Where a benign window's surprise exceeds s once in 10^s windows, evidence of allowance 1 or more and any cap
    exceeds a threshold at most in proportion to 10^(-0.862 threshold), 0.862 being the root of 10^-t = 1 - t
    (Lundberg's exponent); n channels make n times as many false alarms, and the rise takes that factor away."""
    more_q8 = log2_q8(n) * 89 >> 8  # 1.16 x log10(2) = 0.349 = 89 / 256
    return [(allowance, cap, threshold + more_q8) for allowance, cap, threshold in alarm_rules]


def channel_name(name: str) -> str:
    """A service as it was configured -> what the status and the log call it: the last part of a path, at most
    MAX_NAME_BYTES."""
    text = name.rstrip("/").rpartition("/")[2]
    return text.encode()[:MAX_NAME_BYTES].decode(errors="ignore")


def check_services(names: "list[str] | tuple[str, ...]", paths: "list[str]") -> None:
    """Raises ConfigError where two are the same, or too many, or where a name is that of another channel."""
    if len(names) > MAX_SERVICES:
        raise ConfigError("[collector] services: %d of them, at most %d" % (len(names), MAX_SERVICES))
    seen: dict = {}
    for name, path in zip(names, paths):
        if channel_name(name) in _TAKEN or channel_name(name).startswith(_COUNTERS):
            raise ConfigError("[collector] services: %s has the name of another channel; rename its folder" % name)
        for key in (path, channel_name(name)):
            if key in seen:
                raise ConfigError("[collector] services: %s and %s are the same (%s)" % (seen[key], name, key))
        seen[path] = seen[channel_name(name)] = name


def service_path(name: str, root: str) -> str:
    """A unit's name or a path, absolute or below the mount of cgroup v2 -> the folder, which need not be there. A unit
    that runs is found wherever its slice is; another is expected where systemd puts it by itself. Raises
    ConfigError."""
    if "/" in name:
        path = os.path.normpath(name if name.startswith(root + "/") else root + "/" + name.strip("/"))
        elsewhere = name.startswith("/sys/") and not name.startswith(root + "/")
        if elsewhere or not path.startswith(root + "/"):
            raise ConfigError("[collector] services: %s does not lie below %s, where cgroup v2 is" % (name, root))
        return path
    if not name.endswith(_SUFFIXES):
        raise ConfigError(
            '[collector] services: %s is no unit like "nginx.service" and no folder like "/system.slice/nginx.service"'
            % name
        )
    return _running_unit(name, root) or root + "/" + _usual_folder(name)


def _usual_folder(name: str) -> str:
    """systemd.slice(5), systemd.unit(5): where a unit lies that names no slice."""
    stem, _, suffix = name.rpartition(".")
    if suffix == "slice":
        parts = stem.split("-")
        return "/".join(["-".join(parts[: i + 1]) + ".slice" for i in range(len(parts))])
    template, at, _ = stem.partition("@")
    if at:
        return "system.slice/system-%s.slice/%s" % (template.replace("-", "\\x2d"), name)
    return "system.slice/" + name


def _running_unit(name: str, root: str) -> "str | None":
    folders = [(root, 0)]
    for folder, depth in folders:
        try:
            with os.scandir(folder) as entries:
                below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        if name in below:
            return folder + "/" + name
        if depth < _MAX_DEPTH:
            folders += [(folder + "/" + each, depth + 1) for each in sorted(below)][: _MAX_FOLDERS - len(folders)]
    return None
