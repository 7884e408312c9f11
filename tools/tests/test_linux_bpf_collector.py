"""The whole Linux collector with BPF, on the kernel that runs here, and without."""

# ruff: noqa: F811 - fixtures

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import netns
import pytest
from bpf_support import COLUMN_NAMES, RAW_SYNS, ROOT, column, group, links, needs_bpf, net, root  # noqa: F401
from stonechat.errors import CollectorError
from stonechat.linux import (
    bpf,
    bpf_columns,
    connections,
    known_peers,
    packet_program,
    schemas,
)
from stonechat.linux.cgroup_id import cgroup_root
from stonechat.linux.collector import LinuxCollector
from stonechat.linux.connections import Connections, packed_address


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
