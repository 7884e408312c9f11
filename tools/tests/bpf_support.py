"""For the tests of the BPF side: whether it runs here, a control group and a network of their own."""

import os
import sys
from pathlib import Path

import netns
import pytest
from stonechat.linux import (
    bpf,
    schemas,
)
from stonechat.linux.collector import LinuxCollector

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "firmware_tests"))
from targets import unix_i386 as i386  # noqa: E402, F401

RAW_SYNS = """
import random, socket, struct, sys
def checksum(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    total = (total & 0xffff) + (total >> 16)
    return ~(total + (total >> 16)) & 0xffff
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
random.seed(3)
for i in range(int(sys.argv[1])):
    target = "10.%d.%d.%d" % (random.randrange(100, 200), random.randrange(256), random.randrange(1, 255))
    syn = struct.pack("!HHIIBBHHH", 40000, 23, i, 0, 0x50, 2, 1024, 0, 0)
    pseudo = socket.inet_aton("10.77.0.1") + socket.inet_aton(target) + struct.pack("!BBH", 0, 6, 20)
    raw.sendto(syn[:16] + struct.pack("!H", checksum(pseudo + syn)) + syn[18:], (target, 0))
"""
COLUMN_NAMES = [name for name, _, _ in schemas.LINUX_1.columns]
root = pytest.mark.root


def starts_bpf() -> str:
    """Why BPF does not start here, "" where it does."""
    if os.geteuid():
        return "needs root"
    try:
        bpf.Memory(4096, "probe").close()
    except OSError as error:
        return f"the kernel refuses bpf(2): {error.strerror}"
    return ""


needs_bpf = pytest.mark.skipif(bool(starts_bpf()), reason=starts_bpf() or "-")


@pytest.fixture
def group():
    with netns.cgroup() as path:
        yield path


@pytest.fixture
def net():
    with netns.network() as name:
        yield name


def only(numbers, compat=()):
    """A class table in which the given native call numbers are class 1, and those of 32-bit callers class 2."""
    table = bytearray(1024)
    for number in numbers:
        table[number] = 1
    for number in compat:
        table[512 + number] = 2
    return bytes(table)


def native_getppid() -> int:
    return {"x86_64": 110, "aarch64": 173}.get(os.uname().machine, 64)


def column(collector: LinuxCollector, values: list[int], name: str) -> int:
    return values[[column[0] for column in collector.schema.columns].index(name)]


def facts(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: " ".join(rest.split()) for key, _, rest in (line.partition(":") for line in lines)}


def links(pid: int | None = None) -> set[int]:
    """The programs that the links of a process hold, by id."""
    found = set()
    for path in Path(f"/proc/{pid or os.getpid()}/fdinfo").iterdir():
        try:
            found |= {int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("prog_id")}
        except FileNotFoundError:
            continue  # the listing's own descriptor
    return found
