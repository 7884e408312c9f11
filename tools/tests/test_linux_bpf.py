"""Exact counts of BPF on the kernel that runs here."""

# ruff: noqa: F811 - fixtures

import ctypes
import os
import shutil
import subprocess
import sys

import netns
import pytest
from bpf_support import RAW_SYNS, ROOT, group, i386, native_getppid, needs_bpf, net, only, root  # noqa: F401
from stonechat.linux import (
    packet_program,
)
from stonechat.linux.connections import Connections, octets, packed_address, packets
from stonechat.linux.packet_program import OVERFLOW_OUT, OWN_IN, OWN_OUT, RST_IN, SYN_OUT, SYNACK_IN
from stonechat.linux.syscall_classes import CLASSES
from stonechat.linux.syscalls import EXEC, EXIT, FORK, Syscalls

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
