"""The BPF side of the Linux collector: what needs no kernel first, then exact counts on the kernel that runs here."""

import ctypes
import errno
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import netns
import pytest
from stonechat.errors import CollectorError, ConfigError
from stonechat.linux import (
    bpf,
    bpf_columns,
    connections,
    known_peers,
    logins,
    packet_program,
    privileges,
    schemas,
    syscalls,
)
from stonechat.linux.cgroup_id import cgroup_root
from stonechat.linux.collector import LinuxCollector
from stonechat.linux.connections import Connections, distinct, octets, packed_address, packets
from stonechat.linux.packet_program import OVERFLOW_OUT, OWN_IN, OWN_OUT, RST_IN, SYN_OUT, SYNACK_IN
from stonechat.linux.syscall_classes import CLASSES, TABLES
from stonechat.linux.syscalls import EXEC, EXIT, FORK, Syscalls

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "firmware_tests"))
from targets import unix_i386 as i386  # noqa: E402


def starts_bpf() -> str:
    """Why BPF does not start here, "" where it does."""
    if os.geteuid():
        return "needs root"
    try:
        bpf.Memory(4096, "probe").close()
    except OSError as error:
        return f"the kernel refuses bpf(2): {error.strerror}"
    return ""


root = pytest.mark.root
COLUMN_NAMES = [name for name, _, _ in schemas.LINUX_1.columns]
needs_bpf = pytest.mark.skipif(bool(starts_bpf()), reason=starts_bpf() or "-")


# --- the assembler ------------------------------------------------------------------------------------------


def test_encodes_as_the_instruction_set_says():
    p = bpf.Program()
    p.load(8, bpf.R2, bpf.R1, 8)
    p.jump("gt", bpf.R2, 511, "out")
    p.constant(bpf.R3, 0x1_8000_0001)
    p.atomic_add(bpf.R4, 16, bpf.R5)
    p.label("out")
    p.move(bpf.R0, -1)
    p.exit()
    assert p.code().hex() == (
        "7912080000000000"  # r2 = *(u64 *)(r1 + 8)
        "25020300ff010000"  # if r2 > 511 goto +3
        "18030000010000800000000001000000"  # r3 = 0x180000001 ll
        "db54100000000000"  # lock *(u64 *)(r4 + 16) += r5
        "b7000000ffffffff"  # r0 = -1
        "9500000000000000"  # exit
    )


def test_a_label_that_stands_nowhere_or_twice_is_an_error():
    p = bpf.Program()
    p.goto("nowhere")
    with pytest.raises(CollectorError, match="no label nowhere"):
        p.code()
    p.label("twice")
    with pytest.raises(CollectorError, match="twice"):
        p.label("twice")


@root
@needs_bpf
def test_the_verifiers_reason_stands_in_the_message():
    p = bpf.Program()
    p.load(8, bpf.R0, bpf.R3)
    p.exit()
    with pytest.raises(CollectorError, match="verifier refused bad: .*R3 !read_ok"):
        bpf.load_program(bpf.PROG_RAW_TRACEPOINT, p, "bad")


# --- arithmetic on what was counted -------------------------------------------------------------------------


@pytest.mark.parametrize("items", [0, 1, 7, 300, 2_000, 10_000, 50_000, 100_000])
def test_distinct_estimates_within_five_percent(items):
    bits, chance = bytearray(2048), random.Random(items)
    for _ in range(items):
        bit = chance.randrange(16_384)
        bits[bit >> 3] |= 1 << (bit & 7)
    assert abs(distinct(bits) - items) <= max(1, items // 20)


def test_distinct_is_bounded_when_all_bits_are_set():
    assert distinct(b"\xff" * 2048) == pytest.approx(159_000, rel=0.01)


def test_entropy_share():
    assert syscalls.entropy_share_q8([0] * 16) == 0
    assert syscalls.entropy_share_q8([0] * 15 + [9]) == 0
    assert syscalls.entropy_share_q8([1000] * 16) == 25600
    assert abs(syscalls.entropy_share_q8([500, 500] + [0] * 14) - 6400) < 64


def test_addresses_pack_into_sixteen_bytes():
    assert packed_address("192.0.2.1").hex() == "00000000000000000000ffffc0000201"
    assert packed_address("2001:db8::1").hex() == "20010db8000000000000000000000001"
    with pytest.raises(OSError):
        packed_address("192.0.2")


@pytest.mark.parametrize(
    ("abi", "call", "number", "group"),
    [
        ("x86_64", "getppid", 110, "info"),
        ("i386", "getppid", 64, "info"),
        ("aarch64", "getppid", 173, "info"),
        ("armhf", "getppid", 64, "info"),
        ("aarch64", "write", 64, "write"),
        ("x86_64", "unlinkat", 263, "fmod"),
        ("armhf", "execve", 11, "proc"),
        ("aarch64", "bpf", 280, "priv"),
        ("i386", "cachestat", 451, "fmeta"),
    ],
)
def test_class_tables(abi, call, number, group):
    assert CLASSES[int(TABLES[abi][number], 16)] == group, call


def test_class_tables_are_what_the_kernels_headers_give():
    from stonechat_tools.proofs import syscall_tables

    if not Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h").exists():
        pytest.skip("no linux-libc-dev for x86_64 here")
    try:
        calls = {abi: syscall_tables.numbers(Path("/"), abi) for abi in ("x86_64", "i386")}
    except FileNotFoundError:
        pytest.skip("no gcc here")
    for abi, numbers in calls.items():
        assert syscall_tables.table(numbers) == TABLES[abi], abi
    assert syscall_tables.CLASSES == CLASSES


# --- learned peers ------------------------------------------------------------------------------------------


def address(i: int) -> bytes:
    return packed_address(f"10.{i >> 16 & 255}.{i >> 8 & 255}.{i & 255}")


def test_a_peer_is_known_after_so_many_windows():
    learned = known_peers.LearnedPeers(b"secret")
    for _ in range(known_peers.KNOWN_AFTER):
        assert learned.is_new(address(1))
    assert not learned.is_new(address(1))
    assert learned.is_new(address(2))


def test_nothing_is_learned_under_suspicion():
    learned = known_peers.LearnedPeers(b"secret")
    learned.hold = True
    for _ in range(3 * known_peers.KNOWN_AFTER):
        assert learned.is_new(address(1))


def test_a_spray_forgets_no_known_peer_and_stays_bounded():
    learned = known_peers.LearnedPeers(b"secret")
    for _ in range(known_peers.KNOWN_AFTER):
        learned.is_new(address(1))
    for i in range(10_000):
        learned.is_new(address(1000 + i))
    assert not learned.is_new(address(1))
    assert len(learned) == 1
    assert len(learned._candidates) <= known_peers.MAX_CANDIDATES


def seen_often(learned: known_peers.LearnedPeers, peer: bytes, opened: bool = True) -> None:
    for _ in range(known_peers.KNOWN_AFTER):
        learned.is_new(peer, opened)


def test_the_longest_unseen_makes_place_once_it_has_not_been_seen_for_long():
    learned = known_peers.LearnedPeers(b"secret")
    for i in range(known_peers.MAX_KNOWN + 1):
        seen_often(learned, address(i))
    assert len(learned) == known_peers.MAX_KNOWN
    assert learned.forgotten == 0
    assert learned.is_new(address(known_peers.MAX_KNOWN)), "peers in use are kept, and the newcomer is new"
    for _ in range(known_peers.FORGET_AFTER):
        learned.next_window()
    assert not learned.is_new(address(0))  # seen again
    seen_often(learned, address(1000))
    assert learned.forgotten == 1
    assert not learned.is_new(address(0)) and not learned.is_new(address(1000))
    assert learned.is_new(address(1))


def test_who_connects_from_outside_teaches_nothing_about_whom_the_device_calls():
    learned = known_peers.LearnedPeers(b"secret")
    seen_often(learned, address(1), opened=False)
    assert not learned.is_new(address(1), opened=False), "a visitor who came often is an ordinary visitor"
    assert learned.is_new(address(1)), "the day the device calls it, it is new"
    assert len(learned) == 0


def test_outsiders_push_no_known_peer_out():
    learned = known_peers.LearnedPeers(b"secret")
    for i in range(20):
        seen_often(learned, address(i))
    for i in range(2000):
        seen_often(learned, address(5000 + i), opened=False)
    assert not any(learned.is_new(address(i)) for i in range(20))
    assert len(learned._visitors) <= known_peers.MAX_VISITORS
    assert len(learned._visiting) <= known_peers.MAX_CANDIDATES


def test_visitors_are_saved_apart_from_peers():
    learned = known_peers.LearnedPeers(b"secret")
    seen_often(learned, address(1))
    seen_often(learned, address(2), opened=False)
    again = known_peers.LearnedPeers(b"secret")
    again.restore(learned.dump())
    assert not again.is_new(address(1))
    assert not again.is_new(address(2), opened=False)
    assert again.is_new(address(2))


def test_what_was_learned_survives_a_restart_as_hashes_of_this_device_only():
    learned = known_peers.LearnedPeers(b"secret")
    for _ in range(known_peers.KNOWN_AFTER):
        learned.is_new(address(7))
    saved = learned.dump()
    assert len(saved) == 8
    assert address(7)[-4:] not in saved
    again, other_device = known_peers.LearnedPeers(b"secret"), known_peers.LearnedPeers(b"another")
    again.restore(saved)
    other_device.restore(saved)
    assert not again.is_new(address(7))
    assert other_device.is_new(address(7))


@pytest.mark.parametrize("saved", [b"1234567", bytes(8 * known_peers.MAX_KNOWN + 8), 5, None, "12345678"])
def test_what_was_not_saved_by_dump_is_refused(saved):
    with pytest.raises(CollectorError, match="learned peers"):
        known_peers.LearnedPeers(b"secret").restore(saved)


# --- failed logins ------------------------------------------------------------------------------------------


def attempt(path: Path, n: int = 1) -> None:
    with path.open("ab") as file:
        file.write(bytes(logins.RECORD_BYTES * n))


def test_failed_logins_count_what_is_added(tmp_path):
    path = tmp_path / "btmp"
    attempt(path, 3)
    failed = logins.FailedLogins(str(path))
    assert failed.read() == 0  # history
    attempt(path, 2)
    assert failed.read() == 2
    with path.open("ab") as file:
        file.write(b"half a record")
    assert failed.read() == 2


def test_failed_logins_survive_rotation_with_what_was_added_last(tmp_path):
    path = tmp_path / "btmp"
    attempt(path)
    failed = logins.FailedLogins(str(path))
    attempt(path, 2)
    path.rename(tmp_path / "btmp.1")
    assert failed.read() == 2
    path.touch()
    attempt(tmp_path / "btmp.1")  # a writer that had it open
    attempt(path, 4)
    assert failed.read() == 7


def test_failed_logins_survive_truncation_and_a_file_that_comes_late(tmp_path):
    path = tmp_path / "btmp"
    failed = logins.FailedLogins(str(path))
    assert failed.read() == 0
    assert "not there" in failed.note
    attempt(path, 5)
    assert failed.read() == 5
    path.write_bytes(b"")
    assert failed.read() == 5
    attempt(path)
    assert failed.read() == 6


# --- exact counts on this kernel ----------------------------------------------------------------------------

GETPPID = 110
UNLINKS = """
import os
for i in range(300):
    try: os.remove("/nowhere")
    except OSError: pass
"""
CALLS = """
import os
getppid = os.getppid
for _ in range(1_000_000): getppid()
"""


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


@root
@needs_bpf
def test_a_million_calls_are_counted_as_a_million(group):
    calls = Syscalls(cgroup=group, table=only([native_getppid()]))
    try:
        netns.run(CALLS, group=group)
        assert calls.read()[1] == 1_000_000
    finally:
        calls.close()


@root
@needs_bpf
def test_exec_fork_and_exit_are_counted(group):
    program = """
import os
for _ in range(20):
    if os.fork() == 0: os.execv("/bin/true", ["true"])
    os.wait()
"""
    calls = Syscalls(cgroup=group)
    try:
        netns.run(program, group=group)
        counts = calls.read()
        assert counts[EXEC] == 21  # the program itself, and 20 times true
        assert counts[FORK] == 20
        assert counts[EXIT] == 21
        assert counts[CLASSES.index("proc")] >= 60
    finally:
        calls.close()


@root
@needs_bpf
def test_the_collectors_own_calls_are_left_out():
    """A class of its own, and a call number that nobody else uses: what is counted can only come from here."""
    libc = ctypes.CDLL(None)
    unused = 500
    calls = Syscalls(table=only([unused]))
    try:
        for _ in range(1000):
            libc.syscall(unused)
        assert calls.read()[1] == 0
        subprocess.run(
            [sys.executable, "-c", f"import ctypes; l = ctypes.CDLL(None)\nfor _ in range(50): l.syscall({unused})"],
            check=True,
            timeout=60,
        )
        assert calls.read()[1] == 50
    finally:
        calls.close()


@root
@needs_bpf
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_in_a_pid_namespace_it_says_that_its_own_calls_count(group):
    """There its process number is another's; leaving that one out would hide a stranger."""
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "agent")!r})
from stonechat.linux.syscalls import Syscalls
calls = Syscalls(cgroup={group!r}, table={only([native_getppid()])!r})
for _ in range(100): os.getppid()
print(os.getpid(), calls.read()[1], calls.note)
"""
    command = f"""
import subprocess, sys
subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", {program!r}], check=True)
"""
    number, counted, note = netns.run(command, group=group).split(maxsplit=2)
    assert (number, counted) == ("1", "100")
    assert "PID namespace" in note


@root
@needs_bpf
@pytest.mark.skipif(os.uname().machine != "x86_64" or bool(i386().missing), reason=i386().missing or "an x86_64 test")
def test_a_32_bit_caller_counts_by_its_own_numbers(group):
    """unlink is call 10 of i386, which is mprotect for a native caller. The two kinds take turns on each CPU."""
    program = f"""
import os, subprocess
for _ in range(5):
    for _ in range(1000): os.getppid()
    subprocess.run({[*i386().command, "-c", UNLINKS]!r}, check=True)
"""
    calls = Syscalls(cgroup=group, table=only([GETPPID], compat=[10]))
    try:
        netns.run(program, group=group)
        assert calls.read()[1:3] == [5000, 1500]
    finally:
        calls.close()


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

REFUSED = """
import socket
for i in range(5000):
    s = socket.socket()
    try: s.connect(("127.%d.%d.1" % (1 + i // 250, i % 250), 1))
    except ConnectionRefusedError: pass
    s.close()
"""


@root
@needs_bpf
def test_raw_socket_syns_are_counted_exactly_and_their_peers_nearly(group, net):
    watched = Connections(cgroup=group)
    try:
        netns.run(RAW_SYNS, "5000", net=net, group=group)
        watched.read()
        assert watched.counters[SYN_OUT] == 5000
        assert abs(watched.distinct_peers - 5000) <= 250
        assert watched.distinct_ports == 1
    finally:
        watched.close()


@root
@needs_bpf
def test_refused_connects_are_counted_exactly(group, net):
    watched = Connections(interfaces=["lo"], cgroup=group)
    try:
        netns.run(REFUSED, net=net, group=group)
        watched.read()
        assert watched.counters[SYN_OUT] == 5000
        assert watched.counters[RST_IN] == 5000
        assert watched.counters[SYNACK_IN] == 0
        assert abs(watched.distinct_peers - 5000) <= 250
    finally:
        watched.close()


@root
@needs_bpf
def test_bytes_of_each_peer_are_exact_for_both_families_and_the_next_read_begins_anew(group, net):
    program = """
import socket
four, six = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
for i in range(60):
    for _ in range(i % 3 + 1): four.sendto(b"x" * 100, ("10.77.1.%d" % (i + 1), 1000 + i))
for _ in range(7): six.sendto(b"y" * 200, ("::1", 9))
"""
    watched = Connections(interfaces=["out0", "lo"], cgroup=group)
    watched._choose_interfaces = lambda: None  # the names are those of another namespace
    watched._memory.bytes[256:768] = b"\xff" * 512
    try:
        netns.run(program, net=net, group=group)
        watched.read()
        found = {peer: (packets(sent), octets(sent)) for peer, sent, _ in watched.peers}
        expected = {packed_address(f"10.77.1.{i + 1}"): (i % 3 + 1, (i % 3 + 1) * 128) for i in range(60)}
        for peer, traffic in expected.items():
            assert found[peer] == traffic
        assert found[packed_address("::1")][0] >= 7
        assert abs(watched.distinct_ports - 61) <= 2
        watched.read()
        watched.read()
        assert watched.peers == []
        assert watched.distinct_peers == 0
    finally:
        watched.close()


@root
@needs_bpf
def test_ports_that_count_up_are_estimated_as_well_as_any(group, net):
    program = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for i in range(2000): s.sendto(b"x", ("10.77.0.2", 1 + i))
"""
    watched = Connections(cgroup=group)
    try:
        netns.run(program, net=net, group=group)
        watched.read()
        assert abs(watched.distinct_ports - 2000) <= 160
    finally:
        watched.close()


@root
@needs_bpf
def test_a_spray_of_100_000_peers_is_bounded_and_looks_like_one(group, net):
    program = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for i in range(50): s.sendto(b"k" * 1000, ("10.77.0.2", 5))
for i in range(100_000): s.sendto(b"x", ("10.%d.%d.%d" % (100 + i // 65536, i // 256 % 256, i % 256), 9))
"""
    watched = Connections(cgroup=group)
    try:
        netns.run(program, net=net, group=group)
        watched.read()
        assert len(watched.peers) == packet_program.MAX_PEERS
        assert abs(watched.distinct_peers - 100_001) <= 15_000
        overflow = watched.counters[OVERFLOW_OUT]
        sent = [octets(traffic) for _, traffic, _ in watched.peers]
        in_table = sum(packets(traffic) for _, traffic, _ in watched.peers)
        assert in_table + packets(overflow) == 100_050
        assert max(sent) == 50 * 1028  # the spray pushed nobody out
    finally:
        watched.close()


@root
@needs_bpf
def test_the_agents_own_connections_are_left_out_by_user_or_by_broker(group, net):
    program = """
import os, socket
def sends(port, n):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for _ in range(n): s.sendto(b"x" * 72, ("10.77.0.9", port))
sends(1883, 3)
sends(1884, 5)
os.setuid(65534)
sends(2000, 11)
"""
    watched = Connections(cgroup=group, own_user_id=65534)
    try:
        watched.exclude(["192.0.2.1", "10.77.0.9"], 1883)
        netns.run(program, net=net, group=group)
        watched.read()
        assert [(packets(sent), octets(sent)) for _, sent, _ in watched.peers] == [(5, 500)]
        own = watched.counters[OWN_OUT]
        assert (packets(own), octets(own)) == (14, 1400)
        assert watched.counters[OWN_IN] == 0
    finally:
        watched.close()


# --- the whole collector ------------------------------------------------------------------------------------


def column(collector: LinuxCollector, values: list[int], name: str) -> int:
    return values[[column[0] for column in collector.schema.columns].index(name)]


@root
@needs_bpf
def test_the_collector_is_linux_1_and_sees_a_scan(group, net):
    collector = LinuxCollector(peers_secret=b"s" * 32, use_bpf=True, cgroup=group)
    try:
        assert collector.schema is schemas.LINUX_1
        assert [row[0] for row in collector.sources][-3:] == ["syscalls", "connections", "logins"]
        first, second = [0] * len(collector.schema), [0] * len(collector.schema)
        collector.read(first)
        netns.run(RAW_SYNS, "2000", net=net, group=group)
        collector.read(second)

        def grown(name: str) -> int:
            return column(collector, second, name) - column(collector, first, name)

        assert grown("syn_out") == 2000
        assert grown("sys_netio") >= 2000
        assert grown("new_peers") == column(collector, second, "peers")
        assert abs(grown("new_peers") - 2000) <= 100
        assert grown("new_peer_bytes") == 2000 * 40
        assert grown("execs") >= 1
        assert grown("forks") == 0  # the cgroup's, not the machine's
        assert column(collector, second, "cpu_busy") > 0
        assert column(collector, second, "syn_fail") == 25600
    finally:
        collector.close()


@root
@needs_bpf
def test_learned_peers_survive_a_restart_of_the_collector(group, net):
    send = "import socket; socket.socket(2, 2).sendto(b'x', ('10.77.0.9', 9))"
    values = [0] * len(schemas.LINUX_1)

    def new_peers(collector: LinuxCollector) -> int:
        before = column(collector, values, "new_peers")
        netns.run(send, net=net, group=group)
        collector.read(values)
        return column(collector, values, "new_peers") - before

    collector = LinuxCollector(peers_secret=b"s" * 32, use_bpf=True, cgroup=group)
    collector.read(values)
    seen_as_new = [new_peers(collector) for _ in range(known_peers.KNOWN_AFTER + 1)]
    saved = collector.dump()
    collector.close()
    assert seen_as_new == [1] * known_peers.KNOWN_AFTER + [0]
    collector = LinuxCollector(peers_secret=b"s" * 32, use_bpf=True, cgroup=group)
    try:
        assert collector.warmup_windows == known_peers.KNOWN_AFTER
        collector.restore(saved)
        assert collector.warmup_windows == 0
        collector.read(values)
        assert new_peers(collector) == 0
    finally:
        collector.close()


VISITED = """
import os, socket, sys, threading
listener = socket.create_server(("10.77.0.1", 80))
def serve():
    while True:
        stream = listener.accept()[0]
        stream.sendall(b"page" * 100)
        stream.close()
threading.Thread(target=serve, daemon=True).start()
services = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
services.bind(("10.77.0.1", 5000))
services.settimeout(1)
for _ in iter(sys.stdin.readline, ""):
    visitor = socket.create_connection(("10.77.0.1", 80), 2, ("127.9.9.9", 0))
    while visitor.recv(4096): pass
    visitor.close()
    asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asker.bind(("127.9.9.8", 0))
    asker.sendto(b"question", ("10.77.0.1", 5000))
    data, sender = services.recvfrom(100)
    services.sendto(b"answer", sender)
    print("visited", flush=True)
"""


@root
@needs_bpf
def test_connections_and_datagrams_from_outside_do_not_make_a_peer_known(group, net):
    """A visitor and somebody who asks by UDP, both once a window; then the device itself sends to their addresses."""
    # The server's side is what the cgroup counts: the visitors' sockets are in it too, so look at addresses 127.9.9.*.
    watched = Connections(interfaces=["lo"], cgroup=group)
    process = netns.start(VISITED, net=net, group=group)
    try:
        for _ in range(3):
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"visited\n"
            watched.read()
            seen = {peer for peer, _, _ in watched.peers}
            assert {packed_address("127.9.9.9"), packed_address("127.9.9.8")} <= seen
            assert packed_address("127.9.9.9") not in watched.opened
            assert packed_address("127.9.9.8") not in watched.opened
            assert watched.opened[packed_address("10.77.0.1")] == packet_program.OPENED_TCP
    finally:
        process.communicate()
        watched.close()


def test_connections_that_stand_at_the_start_are_this_machines_unless_it_listens_on_their_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname(), 5, ("127.0.0.7", 0))
        theirs, peer = listener.accept()
        found = bpf_columns.opened_connections()
        # 127.0.0.1 is what `ours` has opened; 127.0.0.7 came to a port that is listened on
        assert packed_address("127.0.0.1") in found
        assert packed_address(peer[0]) not in found
        ours.close()
        theirs.close()


@root
@needs_bpf
def test_a_cgroup_that_is_removed_and_made_again_is_found_again(net):
    """As `systemctl restart` does it; the collector has dropped nothing and holds no privilege for it."""
    send = "import socket; s = socket.socket(2, 2); [s.sendto(b'x', ('10.77.0.9', 9)) for _ in range(50)]"
    values = [0] * len(schemas.LINUX_1)
    folder = Path(cgroup_root()) / f"stonechat-restart-{os.getpid()}"
    collector = LinuxCollector(peers_secret=b"s" * 32, use_bpf=True, cgroup=str(folder))  # not there yet
    try:
        for _ in range(3):
            collector.read(values)
            assert collector.lacks == f"cgroup {folder}"
            assert ("lacks", f"cgroup {folder}"[:26], "") in collector.sources
            folder.mkdir()
            collector.read(values)
            assert collector.lacks == ""
            before = list(values)
            netns.run(send, net=net, group=str(folder))
            collector.read(values)
            grown = {name: values[i] - before[i] for i, name in enumerate(COLUMN_NAMES)}
            assert grown["sys_netio"] >= 50 and grown["execs"] >= 1
            assert grown["new_peers"] >= 1
            folder.rmdir()
            collector.read(values)
            before = list(values)
            netns.run(send, net=net)
            collector.read(values)
            assert values[COLUMN_NAMES.index("sys_rate")] == before[COLUMN_NAMES.index("sys_rate")]
            assert values[COLUMN_NAMES.index("cpu_busy")] == 0
    finally:
        collector.close()
        if folder.exists():
            folder.rmdir()


WITHOUT_CAPABILITIES = """
import os, sys
sys.path.insert(0, sys.argv[1])
from stonechat.linux import privileges
privileges._set_capabilities(privileges._libc(), 0)
from stonechat.errors import CollectorError
from stonechat.linux.collector import LinuxCollector
collector = LinuxCollector()
values = [0] * len(collector.schema)
collector.read(values)
print(collector.schema.name)
for row in collector.sources: print(*row)
try: LinuxCollector(use_bpf=True)
except CollectorError as error: print("refused:", error)
"""


@root
@netns.needs_root
def test_without_capabilities_the_collector_is_linux_proc_1_and_says_why(tmp_path):
    printed = netns.run(WITHOUT_CAPABILITIES, str(ROOT / "agent"))
    assert printed.startswith("linux-proc-1\n")
    assert (
        "syscalls none raw tracepoint sys_enter does not start: Operation not permitted (fix: start as root" in printed
    )
    assert "refused: syscalls: " in printed


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EINVAL])
def test_no_bpf_at_all(monkeypatch, code):
    def refuse(command, attributes):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(bpf, "_bpf", refuse)
    collector = LinuxCollector()
    try:
        assert collector.schema is schemas.LINUX_PROC_1
        lost = {row[0]: row[2] for row in collector.sources if row[1] == "none"}
        assert set(lost) == {"syscalls", "connections"}
        assert all(os.strerror(code) in note and "(fix: " in note for note in lost.values())
        collector.read([0] * len(collector.schema))
    finally:
        collector.close()


@root
@needs_bpf
def test_one_group_that_fails_takes_the_others_with_it(monkeypatch):
    def absent():
        raise CollectorError("cgroup v2 is not mounted")

    monkeypatch.setattr(connections, "cgroup_root", absent)
    before = links()
    collector = LinuxCollector()
    try:
        assert collector.schema is schemas.LINUX_PROC_1
        assert [row[0] for row in collector.sources if row[1] == "none"] == ["connections"]
        assert links() == before, "system calls are still being counted"
    finally:
        collector.close()


def test_without_bpf_neither_ctypes_nor_mmap_is_imported():
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "agent")!r})
from stonechat.linux.collector import LinuxCollector
c = LinuxCollector(use_bpf=False)
c.read([0] * len(c.schema))
print(c.schema.name, sorted({{"ctypes", "mmap", "hashlib", "socket", "ssl"}} & set(sys.modules)))
"""
    # -I -S: without the modules that an environment's start-up files may import
    printed = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60)
    assert printed.stdout == "linux-proc-1 []\n", printed.stderr


@root
@needs_bpf
def test_the_collector_with_bpf_fits_in_sixteen_megabytes():
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "agent")!r})
from stonechat.linux.collector import LinuxCollector
c = LinuxCollector(use_bpf=True)
for _ in range(3): c.read([0] * len(c.schema))
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert int(printed.stdout) <= 16 * 1024


# --- privileges and the end ---------------------------------------------------------------------------------

DROPS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from stonechat.linux import privileges
from stonechat.linux.collector import LinuxCollector
collector = LinuxCollector(use_bpf=True)
values = [0] * len(collector.schema)
privileges.drop("nobody", keep_net_admin=sys.argv[2] == "keep")
collector.read(values)
before = values[:]
print("dropped", flush=True)
sys.stdin.readline()
collector.read(values)
calls = [column[0] for column in collector.schema.columns].index("sys_rate")
print(values[calls] > before[calls], flush=True)
try: os.setuid(0)
except PermissionError: print("no way back", flush=True)
sys.stdin.readline()
"""


def facts(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: " ".join(rest.split()) for key, _, rest in (line.partition(":") for line in lines)}


@root
@needs_bpf
@pytest.mark.parametrize(("how", "kept"), [("all", 0), ("keep", 1 << 12)])
def test_after_attaching_every_privilege_is_gone_and_counting_goes_on(how, kept):
    process = netns.start(DROPS, str(ROOT / "agent"), how)
    try:
        assert process.stdout.readline() == b"dropped\n"
        status = facts(process.pid)
        assert status["Uid"] == "65534 65534 65534 65534"
        assert status["Gid"] == "65534 65534 65534 65534"
        assert status["Groups"] == ""
        assert status["NoNewPrivs"] == "1"
        for name in ("CapPrm", "CapEff", "CapBnd"):
            assert int(status[name], 16) == kept, name
        for name in ("CapInh", "CapAmb"):
            assert int(status[name], 16) == 0, name
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"True\n"
        assert process.stdout.readline() == b"no way back\n"
    finally:
        process.kill()
        process.communicate()


def test_root_and_unknown_users_are_refused():
    with pytest.raises(ConfigError, match="root"):
        privileges.user_ids("root")
    with pytest.raises(ConfigError, match="useradd --system"):
        privileges.user_ids("no-such-user-here")
    assert privileges.user_ids("nobody")[0] > 0


PROG_GET_FD_BY_ID, MAP_GET_FD_BY_ID, GET_INFO_BY_FD = 13, 14, 15


def links(pid: int | None = None) -> set[int]:
    """The programs that the links of a process hold, by id."""
    found = set()
    for path in Path(f"/proc/{pid or os.getpid()}/fdinfo").iterdir():
        try:
            found |= {int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("prog_id")}
        except FileNotFoundError:
            continue  # the listing's own descriptor
    return found


def maps_of(program_id: int) -> list[int]:
    """The ids of the maps that a program uses (struct bpf_prog_info, linux/bpf.h)."""
    fd = bpf._bpf(PROG_GET_FD_BY_ID, struct.pack("=3I", program_id, 0, 0))
    ids = (ctypes.c_uint32 * 8)()
    info = ctypes.create_string_buffer(bytes(52) + struct.pack("=IQ", 8, ctypes.addressof(ids)) + bytes(160))
    try:
        bpf._bpf(GET_INFO_BY_FD, struct.pack("=IIQ", fd, len(info), ctypes.addressof(info)))
    finally:
        os.close(fd)
    return list(ids[: struct.unpack_from("=I", info.raw, 52)[0]])


def exists(command: int, identity: int) -> bool:
    try:
        os.close(bpf._bpf(command, struct.pack("=3I", identity, 0, 0)))
    except FileNotFoundError:
        return False
    return True


@root
@needs_bpf
def test_sigkill_leaves_no_program_and_no_map():
    process = netns.start(DROPS, str(ROOT / "agent"), "all")
    try:
        assert process.stdout.readline() == b"dropped\n"
        programs = links(process.pid)
        maps = {identity for program in programs for identity in maps_of(program)}
        assert len(programs) == 6  # sys_enter, exec, fork, exit, both directions
        assert len(maps) == 2
        assert all(exists(PROG_GET_FD_BY_ID, program) for program in programs)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    # The kernel frees what nobody holds once its readers are through (RCU), shortly after the process is gone.
    subprocess.run(["sync"], check=True, timeout=60)
    for _ in range(200):
        left = [p for p in programs if exists(PROG_GET_FD_BY_ID, p)] + [m for m in maps if exists(MAP_GET_FD_BY_ID, m)]
        if not left:
            break
        signal.sigtimedwait([], 0.05)
    assert left == []


def test_rows_of_the_columns_match_the_schema():
    names = [column[0] for column in schemas.LINUX_1.columns]
    assert names[17:30] == [column[0] for column in schemas.SYSCALL_COLUMNS]
    assert names[30:38] == [column[0] for column in schemas.CONNECTION_COLUMNS]
    assert names[38:] == ["login_fail"]
    assert len(bpf_columns._CALL_COLUMNS) == len(schemas.SYSCALL_COLUMNS) - 3


@root
@needs_bpf
def test_the_benchmark_measures_every_row():
    from stonechat_tools.bench import bpf

    for row, figures in bpf.measure(turns=1).items():
        assert figures["base_ns"] > 0 and figures["with_ns"] > 0, row
        assert figures["added_ns"] == pytest.approx(figures["with_ns"] - figures["base_ns"]), row


def test_a_benign_recording_begins_once_the_peers_are_learned(tmp_path):
    """The first windows of a fresh collector, in which everybody is new, would teach a model that strangers are
    ordinary."""
    from stonechat.features import RATE
    from stonechat.schema import Schema
    from stonechat.window import Window
    from stonechat_tools.recording.record import record
    from stonechat_tools.traces.files import read_trace
    from stonechat_tools.traces.format import TraceWriter

    class Counting:
        schema = Schema("one", (("reads", "1", RATE),))
        warmup_windows = 3
        reads = 0

        def read(self, values):
            self.reads += 1
            values[0] = self.reads**2

    for label, first in (("benign", 5**2 - 4**2), ("beacon", 2**2 - 1**2)):
        path = str(tmp_path / (label + ".csv"))
        with TraceWriter(path, Counting.schema, 300, "here", {}, False) as writer:
            assert record(Counting(), Window(Counting.schema, 300), writer, label, 2, lambda n: None)
        assert read_trace(path).deltas[0][0] == first
