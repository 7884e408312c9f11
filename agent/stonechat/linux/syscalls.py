"""System calls by class, and programs started, forked and ended: exact counts for 30 ns a call.

One small program on the raw tracepoint `sys_enter` looks the call's number up in a class table and adds one to this
CPU's counter of that class. Table and counters lie in one mapped page, so reading them is reading memory. The agent's
own process is left out. Work submitted through io_uring never appears as system calls (io_uring_enter itself counts as
`priv`), nor do the time calls of the vDSO.

There is one histogram for the machine, and one for each of the services that are named (services.py). One per process
group was measured: the calls cost no more, but reading 64 groups takes 200 us instead of 4, and "the busiest group"
still hides a slow attacker behind a busy service. `cgroup=` watches one cgroup in place of the machine.

    byte 0     class of each native call number 0..511, then of each 32-bit caller's number 0..511
    byte 1024  how many programs were started and threads moved to another cgroup (u64), then the id of the only cgroup
               that counts
    byte 2048  for each CPU 32 words (u64): the 16 classes, then exec, fork, exit, then which thread called last on this
               CPU, whether it is a 32-bit one, and its service
"""

import os

from ..errors import CollectorError
from ..features import log2_q8
from . import bpf
from .bpf import FP, R0, R1, R2, R3, R6, R7, R8, R9
from .cgroup_id import CgroupId
from .services import Services
from .syscall_classes import TABLES

EXEC, FORK, EXIT = 16, 17, 18
NUMBERS = 512  # call numbers an ABI has; whatever lies beyond counts as `other`
_STARTED_AT = 2 * NUMBERS
_ONLY_AT = _STARTED_AT + 8
_COUNTS_AT = 2048
_LAST_CALLER, _LAST_IS_COMPAT, _LAST_SERVICE = 8 * 24, 8 * 25, 8 * 26  # byte offsets among a CPU's words
_SLOTS = 32  # words a CPU: four cache lines of its own
_CLASSES = 16
_MAX_CPUS = 4096
_CPU = -16  # on the stack: this CPU's number

# Where the registers of the caller show a 32-bit one: (offset in pt_regs, bytes, how, value)
_COMPAT_MARKS = {
    "x86_64": (136, "eq", 0x23, "i386"),  # cs is __USER32_CS
    "aarch64": (264, "set", 0x10, "armhf"),  # pstate has PSR_MODE32_BIT
}


class Syscalls:
    """counts: 19 cumulative counters after read(): the classes in the order of syscall_classes.CLASSES, then EXEC, FORK
    and EXIT.

    cgroup: a folder under the cgroup v2 mount; only processes in it and below it count. None: the whole machine.
    table: bytes of 1024 classes, for tests. services: names of those that are counted by themselves, too.
    `services`: their Services, or None. Raises ConfigError, CollectorError or OSError where it can't start."""

    group = "syscalls"
    source = "raw tracepoint sys_enter"

    def __init__(self, cgroup: "str | None" = None, table: "bytes | None" = None, services=()) -> None:
        self._cpus = 1
        while self._cpus < bpf.possible_cpus():
            self._cpus *= 2
        if self._cpus > _MAX_CPUS:
            raise CollectorError("bpf: %d CPUs, at most %d" % (self._cpus, _MAX_CPUS))
        self.counts = [0] * (_CLASSES + 3)
        self.note = "exact"
        self._own = os.getpid() if _sees_true_process_ids() else None
        if self._own is None:
            self.note = "exact; with the agent's own calls, whose process number a PID namespace hides"
        self._links: list = []
        self._cgroup_helper = bpf.CURRENT_ANCESTOR_CGROUP_ID
        self._compat = _COMPAT_MARKS.get(kernel_machine())
        self._only = CgroupId(cgroup) if cgroup else None
        self.services: Services | None = Services(services, self._cpus) if services else None
        self._may_remember = True
        self._memory = bpf.Memory(_COUNTS_AT + self._cpus * _SLOTS * 8, "stonechat_sys")
        try:
            table = machine_table() if table is None else table
            self._memory.bytes[: len(table)] = table
            if self._only is not None:
                self._memory.words[_ONLY_AT // 8] = self._only.now
            self._attach()
        except (OSError, CollectorError):
            self.close()
            raise

    def read(self) -> list:
        """-> counts, brought up to date, and those of the services. Never fails: it reads memory, and files that may be
        gone."""
        first = _COUNTS_AT // 8
        words = self._memory.words
        if self._only is not None:
            words[_ONLY_AT // 8] = self._only.refresh()
        if self.services is not None:
            self.services.refresh()
            for at in range(first + _LAST_CALLER // 8, first + self._cpus * _SLOTS, _SLOTS):
                words[at] = 0  # whoever called last may be in a service that was found just now
        counts = self.counts
        for slot in range(len(counts)):
            counts[slot] = sum(words[first + slot : first + self._cpus * _SLOTS : _SLOTS])
        return counts

    def close(self) -> None:
        for link in self._links:
            os.close(link)
        self._links = []
        self._memory.close()
        if self.services is not None:
            self.services.close()

    def _attach(self) -> None:
        if self.services is not None:
            try:
                self._link(self._load(self._moved(), "stonechat_moved"), "cgroup_attach_task")
            except OSError:
                self._may_remember = False  # each call asks for its service: 20 ns more
        calls = self._load_sys_enter()
        self._link(calls, "sys_enter")
        for slot, name in ((EXEC, "exec"), (FORK, "fork"), (EXIT, "exit")):
            event = self._load(self._event(slot), "stonechat_" + name)
            self._link(event, "sched_process_" + name)
        self._memory.release_fd()

    def _load_sys_enter(self) -> int:
        try:
            return self._load(self._sys_enter(), "stonechat_sys")
        except (CollectorError, OSError) as error:
            if "#%d" % self._cgroup_helper in str(error) and self._cgroup_helper == bpf.CURRENT_ANCESTOR_CGROUP_ID:
                self._cgroup_helper = bpf.CURRENT_CGROUP_ID  # before 5.15 tracepoints can't ask for an ancestor
                self.note += "; of a cgroup only the processes in itself, not in those below it (Linux before 5.15)"
                return self._load_sys_enter()
            if self._compat is None:
                raise
            self._compat = None  # lockdown=confidentiality refuses to read the caller's registers
            self.note += "; 32-bit callers are counted by the 64-bit table: %s" % error
            return self._load_sys_enter()

    def _load(self, program: bpf.Program, name: str) -> int:
        return bpf.load_program(bpf.PROG_RAW_TRACEPOINT, program, name)

    def _link(self, program_fd: int, tracepoint: str) -> None:
        try:
            self._links.append(bpf.attach_tracepoint(program_fd, tracepoint))
        finally:
            os.close(program_fd)  # the link keeps the program

    def _sys_enter(self) -> bpf.Program:
        """raw_tracepoint/sys_enter: args[0] is the caller's pt_regs, args[1] the call's number. R6 its arguments, R7
        the number, R8 the thread, R9 this CPU's words."""
        p = bpf.Program()
        p.copy(R6, R1)
        self._leave_out(p)
        self._find_words(p)
        self._know_caller(p)
        p.load(8, R7, R6, 8)
        p.jump("lt", R7, NUMBERS - 1, "known")
        p.move(R7, NUMBERS - 1)  # also -1, x32 and ARM's private calls
        p.label("known")
        if self._compat:  # the second half of the table
            p.load(8, R1, R9, _LAST_IS_COMPAT)
            p.alu("and", R1, NUMBERS)
            p.alu_reg("add", R7, R1)
        p.map_value(R1, self._memory.fd)
        p.alu_reg("add", R1, R7)
        p.load(1, R1, R1)
        p.alu("and", R1, _CLASSES - 1)
        p.alu("shl", R1, 3)
        p.copy(R7, R1)
        if self.services is not None:
            p.load(8, R6, R9, _LAST_SERVICE)
        p.alu_reg("add", R9, R1)
        self._count(p, 0)
        return p

    def _event(self, slot: int) -> bpf.Program:
        p = bpf.Program()
        self._leave_out(p)
        self._find_words(p)
        if slot == EXEC:
            self._forget_callers(p)
        p.move(R7, 8 * slot)
        if self.services is not None:
            self.services.find_caller(p, self._cgroup_helper, R6)
        self._count(p, 8 * slot)
        return p

    def _moved(self) -> bpf.Program:
        p = bpf.Program()
        self._forget_callers(p)
        p.move(R0, 0)
        p.exit()
        return p

    def _forget_callers(self, p: bpf.Program) -> None:
        p.map_value(R1, self._memory.fd, _STARTED_AT)
        p.move(R2, 1)
        p.atomic_add(R1, 0, R2)

    def _leave_out(self, p: bpf.Program) -> None:
        """Skip the agent itself, and whoever is not in the chosen cgroup."""
        p.call(bpf.CURRENT_PID_TGID)
        p.copy(R8, R0)
        if self._own is not None:
            p.alu("shr", R0, 32)
            p.jump("eq", R0, self._own, "out")
        if self._only:
            p.move(R1, self._only.level)
            p.call(self._cgroup_helper)
            p.map_value(R1, self._memory.fd, _ONLY_AT)
            p.load(8, R1, R1)
            p.jump_reg("ne", R0, R1, "out")

    def _find_words(self, p: bpf.Program) -> None:
        p.call(bpf.SMP_PROCESSOR_ID)
        p.alu("and", R0, self._cpus - 1)
        if self.services is not None:
            p.store(8, FP, _CPU, R0)
        p.alu("mul", R0, _SLOTS * 8)
        p.map_value(R9, self._memory.fd, _COUNTS_AT)
        p.alu_reg("add", R9, R0)

    def _know_caller(self, p: bpf.Program) -> None:
        """Note at this CPU's words whether the caller is a 32-bit one, which counts by numbers of its own, and in which
        service it is.

        Asking costs as much as all the rest, so each CPU remembers who called last and asks again only when it is
        another thread, when any program was started (exec may change the kind) or moved to another cgroup since, or
        after a reading, which may have found a new service."""
        if not self._compat and self.services is None:
            return
        p.map_value(R1, self._memory.fd, _STARTED_AT)
        p.load(8, R1, R1)
        p.alu("shl", R1, 32)
        p.alu("shl", R8, 32)
        p.alu("shr", R8, 32)
        p.alu_reg("or", R8, R1)
        p.load(8, R1, R9, _LAST_CALLER)
        p.jump_reg("eq", R1, R8, "remembered")
        if self._may_remember:
            p.store(8, R9, _LAST_CALLER, R8)
        if self._compat:
            offset, condition, mark, _ = self._compat
            p.store_value(8, FP, -8, 0)
            p.copy(R1, FP)
            p.alu("add", R1, -8)
            p.move(R2, 8)
            p.load(8, R3, R6)
            p.alu("add", R3, offset)
            p.call(bpf.PROBE_READ_KERNEL)
            p.load(8, R1, FP, -8)
            p.store_value(8, R9, _LAST_IS_COMPAT, 0)
            p.jump(condition, R1, mark, "compat")
            p.goto("of_a_kind")
            p.label("compat")
            p.store_value(8, R9, _LAST_IS_COMPAT, NUMBERS)
            p.label("of_a_kind")
        if self.services is not None:
            self.services.find_caller(p, self._cgroup_helper, R8)
            p.store(8, R9, _LAST_SERVICE, R8)
        p.label("remembered")

    def _count(self, p: bpf.Program, offset: int) -> None:
        """The word at R9 + offset += 1, and that at R7 of the service at R6. Programs on a tracepoint are not
        interrupted by their like, so that a plain add on the CPU's own words is exact."""
        p.load(8, R2, R9, offset)
        p.alu("add", R2, 1)
        p.store(8, R9, offset, R2)
        if self.services is not None:
            self.services.count_call(p, _CPU)
        p.label("out")
        p.move(R0, 0)
        p.exit()


def _sees_true_process_ids() -> bool:
    """False in a container's PID namespace: the programs see the numbers of the first one, which always has the same
    inode (PROC_PID_INIT_INO, linux/proc_ns.h)."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC
    except OSError:
        return True  # a kernel without PID namespaces


def kernel_machine() -> str:
    """The kernel's own architecture, by its name in TABLES, whatever uname reports to a 32-bit userland."""
    try:
        with open("/proc/sys/kernel/arch") as file:  # since 6.1
            name = file.read().strip()
    except OSError:
        name = os.uname().machine
    if name == "armv8l":  # an arm64 kernel to a process of personality linux32
        return "aarch64"
    return "armhf" if name.startswith("arm") else "i386" if name[1:] in ("386", "486", "586", "686") else name


def machine_table() -> bytes:
    """The classes of this kernel's calls: 512 native ones, then 512 of the 32-bit ABI that it runs as well."""
    native = kernel_machine()
    if native not in TABLES:
        raise CollectorError("no system call table for %s; there are %s" % (native, ", ".join(sorted(TABLES))))
    compat = _COMPAT_MARKS[native][3] if native in _COMPAT_MARKS else native
    return b"".join(
        bytes(int(digit, 16) for digit in TABLES[abi].ljust(NUMBERS, "0")[:NUMBERS]) for abi in (native, compat)
    )


def entropy_share_q8(classes: list) -> int:
    """classes: calls of each class in a window -> how evenly they spread, in percent Q8: 25600 when all 16 are alike,
    0 for one class only or none at all."""
    total = sum(classes)
    if total == 0:
        return 0
    whole_q8 = log2_q8(total)
    bits_q8 = sum(count * (whole_q8 - log2_q8(count)) for count in classes if count) // total
    return min(25600, max(0, bits_q8 * 25600 // (4 * 256)))
