"""A small eBPF assembler and loader: ctypes and bpf(2), no compiler, no libbpf, no BTF.

A program is written as calls on a Program, one an instruction, with symbolic registers and labels:

    program = Program()
    program.load(8, R2, R1, 8)              # R2 = *(u64 *)(R1 + 8)
    program.jump("gt", R2, 511, "out")      # if R2 > 511 goto out
    ...
    program.label("out")
    program.move(R0, 0)
    program.exit()

What is loaded lives exactly as long as its file descriptors: a killed agent leaves no program, no map, no link behind.
Instruction encoding: Documentation/bpf/standardization/instruction-set.rst; commands and structures: linux/bpf.h.
Needs 5.10 and, while loading and attaching, CAP_BPF + CAP_PERFMON (tracing) + CAP_NET_ADMIN (cgroup), or root.
"""

import ctypes
import errno
import mmap
import os
import struct

from ..errors import CollectorError

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, FP = range(11)  # R1-R5 die in a call, R6-R9 survive, FP is the stack's end

# Helpers (linux/bpf.h, __BPF_FUNC_MAPPER)
SMP_PROCESSOR_ID = 8
CURRENT_PID_TGID = 14
SOCKET_UID = 47
CURRENT_CGROUP_ID = 80
SKB_ANCESTOR_CGROUP_ID = 83
PROBE_READ_KERNEL = 113
CURRENT_ANCESTOR_CGROUP_ID = 123

PROG_CGROUP_SKB = 8
PROG_RAW_TRACEPOINT = 17
ATTACH_CGROUP_INGRESS = 0
ATTACH_CGROUP_EGRESS = 1

_MAP_CREATE, _PROG_LOAD, _RAW_TRACEPOINT_OPEN, _LINK_CREATE = 0, 5, 17, 28
_MAP_ARRAY = 2
_F_MMAPABLE = 1 << 10
_RLIMIT_MEMLOCK_BEFORE = (5, 11)  # older kernels charge maps to this limit instead of the memory cgroup
_LOG_BYTES = 1 << 18

_JUMPS = {"eq": 0x15, "gt": 0x25, "ge": 0x35, "set": 0x45, "ne": 0x55, "lt": 0xA5, "le": 0xB5}
_SIZES = {4: 0x00, 2: 0x08, 1: 0x10, 8: 0x18}
_ALU = {"add": 0x07, "sub": 0x17, "mul": 0x27, "or": 0x47, "and": 0x57, "shl": 0x67, "shr": 0x77, "xor": 0xA7}
_ALU["move"] = 0xB7
_PSEUDO_MAP_VALUE = 2


def _signed32(value: int) -> int:
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


class Program:
    """Instructions in the order in which they are added. `dst` and `src` are registers; a `value` is a constant."""

    def __init__(self) -> None:
        self._slots: list = []  # (opcode, dst, src, offset or label, immediate): eight bytes each
        self._labels: dict = {}

    def __len__(self) -> int:
        return len(self._slots)

    def label(self, name: str) -> None:
        if name in self._labels:
            raise CollectorError("bpf: label %s is there twice" % name)
        self._labels[name] = len(self._slots)

    def alu(self, operation: str, dst: int, value: int) -> None:
        """dst = dst OPERATION value, 64 bits wide; value is a signed 32-bit constant."""
        self._add(_ALU[operation], dst, 0, 0, _signed32(value))

    def alu_reg(self, operation: str, dst: int, src: int) -> None:
        self._add(_ALU[operation] | 0x08, dst, src)

    def move(self, dst: int, value: int) -> None:
        self.alu("move", dst, value)

    def copy(self, dst: int, src: int) -> None:
        self.alu_reg("move", dst, src)

    def constant(self, dst: int, value: int) -> None:
        """dst = value, all 64 bits of it."""
        self._add(0x18, dst, 0, 0, _signed32(value))
        self._add(0, 0, 0, 0, _signed32(value >> 32))

    def map_value(self, dst: int, map_fd: int, offset: int = 0) -> None:
        """dst = the address of byte `offset` in the first (only) value of an array map."""
        self._add(0x18, dst, _PSEUDO_MAP_VALUE, 0, map_fd)
        self._add(0, 0, 0, 0, offset)

    def load(self, size: int, dst: int, src: int, offset: int = 0) -> None:
        """dst = the `size` bytes at src + offset, zero-extended."""
        self._add(0x61 | _SIZES[size], dst, src, offset)

    def store(self, size: int, dst: int, offset: int, src: int) -> None:
        """the `size` bytes at dst + offset = src."""
        self._add(0x63 | _SIZES[size], dst, src, offset)

    def store_value(self, size: int, dst: int, offset: int, value: int) -> None:
        self._add(0x62 | _SIZES[size], dst, 0, offset, _signed32(value))

    def atomic_add(self, dst: int, offset: int, src: int) -> None:
        """the u64 at dst + offset += src, whole even where two CPUs do it at once."""
        self._add(0xDB, dst, src, offset)

    def big_endian(self, dst: int, bits: int) -> None:
        """The low `bits` of dst from network order to the CPU's own (or back), the rest zero."""
        self._add(0xDC, dst, 0, 0, bits)

    def call(self, helper: int) -> None:
        self._add(0x85, 0, 0, 0, helper)

    def jump(self, condition: str, dst: int, value: int, label: str) -> None:
        """if dst CONDITION value (unsigned) goto label. Conditions: eq ne gt ge lt le set (any common bit)."""
        self._add(_JUMPS[condition], dst, 0, label, _signed32(value))

    def jump_reg(self, condition: str, dst: int, src: int, label: str) -> None:
        self._add(_JUMPS[condition] | 0x08, dst, src, label)

    def goto(self, label: str) -> None:
        self._add(0x05, 0, 0, label)

    def exit(self) -> None:
        self._add(0x95)

    def code(self) -> bytes:
        """The machine code. Raises CollectorError for a label that is nowhere."""
        out = bytearray()
        for position, (opcode, dst, src, offset, value) in enumerate(self._slots):
            if isinstance(offset, str):
                if offset not in self._labels:
                    raise CollectorError("bpf: no label %s" % offset)
                offset = self._labels[offset] - position - 1
            out += struct.pack("=BBhi", opcode, dst | src << 4, offset, value)
        return bytes(out)

    def _add(self, opcode: int, dst: int = 0, src: int = 0, offset=0, value: int = 0) -> None:
        self._slots.append((opcode, dst, src, offset, value))


def _syscall_number() -> int:
    """bpf(2) in the ABI of this process: 32-bit userland on a 64-bit kernel (Raspberry Pi OS) calls by its own."""
    machine = os.uname().machine
    wide = struct.calcsize("P") == 8
    if machine in ("x86_64", "i686", "i586", "i386"):
        return 321 if wide else 357
    if (machine == "aarch64" and wide) or machine == "riscv64":
        return 280
    if machine.startswith("arm") or machine == "aarch64":
        return 386
    raise CollectorError("bpf: no system call number known for %s" % machine)


def _bpf(command: int, attributes: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = libc.syscall(
        ctypes.c_long(_syscall_number()), ctypes.c_long(command), buffer, ctypes.c_ulong(len(attributes))
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


class Memory:
    """One array map of a single value, mapped into this process: `words` (a memoryview of u64) and `bytes` show what
    the programs write, with no system call and no privilege needed to look."""

    def __init__(self, size: int, name: str) -> None:
        """size: bytes, rounded up to whole pages. Raises OSError."""
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.size = size
        self.fd = _bpf(_MAP_CREATE, struct.pack("=7I16sI", _MAP_ARRAY, 4, size, 1, _F_MMAPABLE, 0, 0, name.encode(), 0))
        try:
            self._mmap = mmap.mmap(self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            os.close(self.fd)
            raise
        self.bytes = memoryview(self._mmap)
        self.words = self.bytes.cast("Q")

    def release_fd(self) -> None:
        """Close the map's descriptor once programs are attached: mapping and programs keep the map alive."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def close(self) -> None:
        self.release_fd()
        self.words.release()
        self.bytes.release()
        self._mmap.close()


def load_program(kind: int, program: Program, name: str, expected_attach: int = 0) -> int:
    """-> a file descriptor. Raises CollectorError with the verifier's last words, OSError where the kernel has no such
    program type or the capability is missing."""
    code = ctypes.create_string_buffer(program.code(), 8 * len(program))
    licence = ctypes.create_string_buffer(b"GPL")  # some helpers are for GPL programs only

    def attributes(log=None) -> bytes:
        return struct.pack(
            "=IIQQIIQII16sII",
            kind,
            len(program),
            ctypes.addressof(code),
            ctypes.addressof(licence),
            1 if log else 0,
            _LOG_BYTES if log else 0,
            ctypes.addressof(log) if log else 0,
            0,
            0,
            name.encode(),
            0,
            expected_attach,
        )

    try:
        return _bpf(_PROG_LOAD, attributes())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):  # not the verifier's refusals
            raise
        log = ctypes.create_string_buffer(_LOG_BYTES)
        try:
            return _bpf(_PROG_LOAD, attributes(log))
        except OSError as refused:
            words = log.value.decode(errors="replace").strip()
            if not words:
                raise refused
            raise CollectorError("bpf: the verifier refused %s: %s" % (name, _tail(words)))


def _tail(words: str, lines: int = 6) -> str:
    """The verifier's verdict is before its statistics line; the instruction it refused is just above."""
    kept = [line for line in words.splitlines() if line and not line.startswith(("processed ", "verification time"))]
    return " | ".join(kept[-lines:])


def attach_tracepoint(program_fd: int, name: str) -> int:
    """-> a link: closing it (or dying) detaches."""
    buffer = ctypes.create_string_buffer(name.encode())
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QIIQ", ctypes.addressof(buffer), program_fd, 0, 0))


def attach_cgroup(program_fd: int, cgroup_fd: int, direction: int) -> int:
    """direction: ATTACH_CGROUP_INGRESS or _EGRESS -> a link (5.7), beside whatever else is attached there."""
    return _bpf(_LINK_CREATE, struct.pack("=4I16x", program_fd, cgroup_fd, direction, 0))


def possible_cpus() -> int:
    """How many CPU numbers the kernel may ever use (/sys/devices/system/cpu/possible: "0-3" or "0,2-5")."""
    with open("/sys/devices/system/cpu/possible") as file:
        return 1 + max(int(part) for part in file.read().strip().replace("-", ",").split(","))


def raise_memlock() -> None:
    """Before 5.11 maps count against RLIMIT_MEMLOCK, whose default is too small. Raises nothing: making the map will
    fail."""
    import resource

    if tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2]) >= _RLIMIT_MEMLOCK_BEFORE:
        return
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        pass
