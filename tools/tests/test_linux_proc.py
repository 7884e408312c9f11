"""The unprivileged Linux collector, on files that a test writes and on the machine that it runs on."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stonechat.errors import CollectorError
from stonechat.features import LEVEL, RATE, SHARE
from stonechat.linux.proc import PARTS, ProcCollector, start
from stonechat.linux.schemas import LINUX_PROC_1
from stonechat.linux.sock_diag import NetlinkListeners, TableListeners
from stonechat.window import Window

WINDOW_MS = 1000
COLUMNS = [name for name, _, _ in LINUX_PROC_1.columns]
DEV_HEAD = (
    "Inter-|   Receive      |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes\n"
)
TCP_LINE = "%4d: 0100007F:%04X 00000000:0000 %s 00000000:00000000 00:00000000 00000000     0        0 %d\n"


class FakeProc:
    """A procfs in a folder. `interfaces`: name -> [bytes in, packets in, bytes out, packets out]; the other figures
    are plain attributes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.interfaces = {"lo": [500, 5, 500, 5], "eth0": [1_000_000, 1000, 2_000_000, 2000]}
        self.tcp = {
            "ActiveOpens": 10,
            "PassiveOpens": 20,
            "AttemptFails": 1,
            "EstabResets": 2,
            "CurrEstab": 3,
            "OutSegs": 900,
        }
        self.tcp |= {"RetransSegs": 4, "OutRsts": 5}
        self.udp = {"InDatagrams": 70, "NoPorts": 7, "OutDatagrams": 80}
        self.icmp = {"InDestUnreachs": 6, "OutMsgs": 9}
        self.ip = {"ForwDatagrams": 0, "OutRequests": 1000, "OutTransmits": 1000}
        self.six = {"Ip6OutForwDatagrams": 0, "Ip6OutRequests": 50, "Icmp6InDestUnreachs": 1, "Icmp6OutMsgs": 2}
        self.six |= {"Udp6InDatagrams": 3, "Udp6NoPorts": 4, "Udp6OutDatagrams": 5}
        self.ticks = [100, 0, 50, 1000, 10, 0, 5, 0, 0, 0]
        self.stat = {"ctxt": 5000, "btime": 1_700_000_000, "processes": 300}
        self.memory = {"MemTotal": 1_000_000, "MemFree": 100_000, "MemAvailable": 400_000}
        self.vmstat = {"nr_free_pages": 1, "nr_dirtied": 100, "pgpgin": 2000, "pgpgout": 3000, "pgfault": 40_000}
        self.listening = [22, 80]
        (root / "net").mkdir()
        self.write()

    def write(self) -> None:
        rows = "".join(
            f"{name:>6}: {i[0]} {i[1]} 0 0 0 0 0 0 {i[2]} {i[3]} 0 0 0 0 0 0\n" for name, i in self.interfaces.items()
        )
        self._put("net/dev", DEV_HEAD + rows)
        tables = (
            ("Ip", self.ip),
            ("Icmp", self.icmp),
            ("IcmpMsg", {"InType3": 6}),
            ("Tcp", self.tcp),
            ("Udp", self.udp),
        )
        self._put(
            "net/snmp",
            "".join(f"{k}: {' '.join(t)}\n{k}: {' '.join(map(str, t.values()))}\n" for k, t in tables),
        )
        self._put("net/snmp6", "".join(f"{k:<32}\t{v}\n" for k, v in self.six.items()))
        sockets = [(port, "0A") for port in self.listening] + [(51234, "01")]
        self._put("net/tcp", "  sl  local_address rem_address   st tx_queue rx_queue\n")
        with (self.root / "net/tcp").open("a") as file:
            file.writelines(TCP_LINE % (i, port, state, i) for i, (port, state) in enumerate(sockets))
        cpu = " ".join(map(str, self.ticks))
        stat = "".join(f"{k} {v}\n" for k, v in self.stat.items())
        self._put("stat", f"cpu  {cpu}\ncpu0 {cpu}\nintr 77 0 0\n{stat}")
        self._put("meminfo", "".join(f"{k}:{v:>16} kB\n" for k, v in self.memory.items()))
        self._put("vmstat", "".join(f"{k} {v}\n" for k, v in self.vmstat.items()))

    def _put(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)  # the same inode: the collector keeps its file open


@pytest.fixture
def fake(tmp_path):
    return FakeProc(tmp_path)


class Watched:
    """A collector on a fake procfs and the window behind it: `step()` writes, reads and returns the window's deltas."""

    def __init__(self, fake: FakeProc, interfaces=None) -> None:
        self.fake = fake
        self.collector = ProcCollector(interfaces, proc=str(fake.root))
        self.window = Window(LINUX_PROC_1, WINDOW_MS)
        self.now_ms = 0
        self.step()

    def step(self) -> dict[str, int]:
        self.fake.write()
        values = [0] * len(LINUX_PROC_1)
        self.collector.read(values)
        self.now_ms += WINDOW_MS
        self.window.push(values, self.now_ms)
        return dict(zip(COLUMNS, self.window.deltas, strict=True))


def test_the_schema_is_compact_and_every_column_is_of_a_known_kind():
    assert len(set(COLUMNS)) == len(COLUMNS) == 26
    assert {kind for _, _, kind in LINUX_PROC_1.columns} == {RATE, LEVEL, SHARE}
    assert LINUX_PROC_1.name == "linux-proc-1"


def test_each_counter_lands_in_its_column(fake):
    watched = Watched(fake)
    growth = {
        "conn_out": (fake.tcp, "ActiveOpens", 11),
        "conn_in": (fake.tcp, "PassiveOpens", 12),
        "conn_fail": (fake.tcp, "AttemptFails", 13),
        "conn_reset": (fake.tcp, "EstabResets", 14),
        "rst_out": (fake.tcp, "OutRsts", 15),
        "retrans": (fake.tcp, "RetransSegs", 16),
        "udp_in": (fake.udp, "InDatagrams", 17),
        "udp_out": (fake.udp, "OutDatagrams", 18),
        "udp_noport": (fake.udp, "NoPorts", 19),
        "icmp_unreach_in": (fake.icmp, "InDestUnreachs", 20),
        "ctxt": (fake.stat, "ctxt", 21),
        "forks": (fake.stat, "processes", 22),
        "pgfault": (fake.vmstat, "pgfault", 23),
        "pages_dirtied": (fake.vmstat, "nr_dirtied", 24),
        "disk_read": (fake.vmstat, "pgpgin", 25),
        "disk_written": (fake.vmstat, "pgpgout", 26),
    }
    for table, key, delta in growth.values():
        table[key] += delta
    fake.tcp["CurrEstab"] = 9
    fake.listening = [22, 80, 443]
    fake.interfaces["eth0"] = [1_000_100, 1002, 2_003_000, 2003]
    fake.interfaces["lo"] = [9_999_999, 99_999, 9_999_999, 99_999]
    fake.memory["MemAvailable"] = 250_000
    fake.ticks = [100 + 30, 0, 50 + 20, 1000 + 140, 10 + 10, 0, 5, 0, 0, 0]
    deltas = watched.step()
    for name, (_, _, delta) in growth.items():
        assert deltas[name] == delta, name
    assert (deltas["estab"], deltas["listen_ports"]) == (9, 3)
    assert (deltas["bytes_in"], deltas["pkts_in"], deltas["bytes_out"], deltas["pkts_out"]) == (100, 2, 3000, 3)
    assert deltas["mean_out_size"] == 1000
    assert deltas["mem_avail"] == 25 * 256
    assert deltas["cpu_busy"] == 25 * 256


def test_ipv6_counts_beside_ipv4(fake):
    watched = Watched(fake)
    fake.six["Udp6InDatagrams"] += 5
    fake.six["Udp6OutDatagrams"] += 6
    fake.six["Udp6NoPorts"] += 7
    fake.six["Icmp6InDestUnreachs"] += 8
    deltas = watched.step()
    assert [deltas[name] for name in ("udp_in", "udp_out", "udp_noport", "icmp_unreach_in")] == [5, 6, 7, 8]


def test_raw_packets_are_what_ip_sent_beyond_tcp_udp_and_icmp(fake):
    watched = Watched(fake)
    fake.ip["OutRequests"] += 100 + 40 + 3 + 20 + 10  # raw, TCP, TCP again, UDP, ICMP
    fake.tcp["OutSegs"] += 40
    fake.tcp["OutRsts"] += 15  # already among OutSegs
    fake.tcp["RetransSegs"] += 3
    fake.udp["OutDatagrams"] += 20
    fake.icmp["OutMsgs"] += 10
    assert watched.step()["ip_out_unattrib"] == 100
    fake.tcp["OutSegs"] += 500  # offload: more TCP segments than IP packets
    fake.ip["OutRequests"] += 60
    assert watched.step()["ip_out_unattrib"] == 0
    fake.six["Ip6OutRequests"] += 30
    fake.tcp["OutSegs"] += 25
    assert watched.step()["ip_out_unattrib"] == 5


@pytest.mark.parametrize(("has_transmits", "want"), [(True, 500), (False, 0)])
def test_forwarded_packets_are_not_this_devices(fake, has_transmits, want):
    if not has_transmits:
        del fake.ip["OutTransmits"]
        fake.write()
    watched = Watched(fake)
    fake.ip["OutRequests"] += 500
    fake.ip["ForwDatagrams"] += 500
    assert watched.step()["ip_out_unattrib"] == want


def test_interfaces_that_come_go_and_start_anew_never_jump(fake):
    fake.interfaces["eth0"] = [3_900_000_000, 4_000_000_000, 3_800_000_000, 4_100_000_000]  # a wrap could be meant
    watched = Watched(fake)
    fake.interfaces["wlan0"] = [7_000_000, 7000, 8_000_000, 8000]
    assert watched.step()["bytes_in"] == 0
    fake.interfaces["wlan0"] = [7_000_100, 7001, 8_000_200, 8002]
    assert watched.step()["bytes_in"] == 100
    del fake.interfaces["wlan0"]
    assert watched.step()["bytes_out"] == 0
    fake.interfaces["wlan0"] = [9_000_000, 9000, 9_000_000, 9000]
    assert watched.step()["bytes_out"] == 0
    fake.interfaces["eth0"] = [1200, 12, 1300, 13]  # the driver was loaded again
    deltas = watched.step()
    assert [deltas[name] for name in ("bytes_in", "bytes_out", "pkts_in", "pkts_out")] == [0, 0, 0, 0]
    fake.interfaces["eth0"] = [1300, 13, 1500, 14]
    deltas = watched.step()
    assert [deltas[name] for name in ("bytes_in", "bytes_out", "pkts_in", "pkts_out")] == [100, 200, 1, 1]
    assert watched.window.resets == 0


def test_a_32_bit_counter_that_wraps_counts_on(fake):
    fake.interfaces["eth0"] = [0xFFFFFF00, 1000, 2000, 20]
    fake.tcp["OutSegs"] = 0xFFFFFFFE
    fake.vmstat["pgfault"] = 0xFFFFFFF0
    watched = Watched(fake)
    fake.interfaces["eth0"] = [0x100, 1004, 2000, 20]
    fake.tcp["OutSegs"] = 2
    fake.ip["OutRequests"] += 4
    fake.vmstat["pgfault"] = 0x10
    deltas = watched.step()
    assert deltas["bytes_in"] == 0x200
    assert deltas["pgfault"] == 0x20
    assert deltas["ip_out_unattrib"] == 0


def test_chosen_interfaces_only_and_one_that_is_not_there_yet(fake):
    watched = Watched(fake, interfaces=("lo", "ppp0"))
    note = next(note for group, _, note in watched.collector.sources if group == "bandwidth")
    assert note == "counts lo; not there yet: ppp0"
    fake.interfaces["lo"][0] += 50
    fake.interfaces["eth0"][0] += 7000
    fake.interfaces["ppp0"] = [100, 1, 100, 1]
    assert watched.step()["bytes_in"] == 50
    fake.interfaces["ppp0"] = [160, 2, 100, 1]
    assert watched.step()["bytes_in"] == 60


def test_a_silent_window_keeps_the_last_mean_size(fake):
    watched = Watched(fake)
    fake.interfaces["eth0"] = [1_000_000, 1000, 2_000_900, 2003]
    assert watched.step()["mean_out_size"] == 300
    assert watched.step()["mean_out_size"] == 300


def test_a_hundred_veth_interfaces_are_bounded(fake):
    fake.interfaces |= {f"veth{i}": [10 * i, i, 10 * i, i] for i in range(100)}
    fake.write()
    watched = Watched(fake)
    note = next(note for group, _, note in watched.collector.sources if group == "bandwidth")
    assert note.endswith("; 37 more left out")
    fake.interfaces["eth0"][0] += 9
    assert watched.step()["bytes_in"] == 9


def test_a_clock_step_and_a_suspend_leave_the_window_clean(fake):
    """CPU shares come from ticks, rates from ticks_ms: the wall clock takes no part. A gap drops one window."""
    watched = Watched(fake)
    watched.now_ms += 3_600_000
    fake.interfaces["eth0"][0] += 10**9
    watched.step()
    assert watched.window.dropped == 1
    fake.interfaces["eth0"][0] += 5
    assert watched.step()["bytes_in"] == 5
    fake.ticks[4] -= 3  # iowait is known to step back
    fake.ticks[3] += 100
    assert watched.step()["cpu_busy"] == 0


@pytest.mark.parametrize("group", [kind.group for kind, _ in PARTS])
def test_a_missing_source_is_refused_with_its_reason_and_the_fix(fake, group):
    kind = next(kind for kind, _ in PARTS if kind.group == group)
    name = getattr(kind, "source", "") or "/proc/net/tcp"
    (fake.root / name[len("/proc/") :]).unlink()
    with pytest.raises(CollectorError) as caught:
        ProcCollector(proc=str(fake.root))
    assert group + ": " in str(caught.value)
    assert "No such file" in str(caught.value)
    assert kind.fix in str(caught.value)
    started, failed = start(None, str(fake.root))
    assert [row[0] for row in failed] == [group]
    assert len(started) == len(PARTS) - 1
    for part, _ in started:
        part.close()


def test_no_proc_at_all_names_every_group(tmp_path):
    with pytest.raises(CollectorError) as caught:
        ProcCollector(proc=str(tmp_path))
    for kind, _ in PARTS:
        assert kind.group + ": " in str(caught.value)


def test_no_file_stays_open_when_the_start_fails(fake):
    (fake.root / "vmstat").write_text("nr_free_pages 1\n")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CollectorError, match="has no pgfault"):
        ProcCollector(proc=str(fake.root))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_column_that_the_kernel_lacks_is_refused(fake):
    del fake.memory["MemAvailable"]
    fake.write()
    with pytest.raises(CollectorError, match="MemAvailable.*Linux 3.14"):
        ProcCollector(proc=str(fake.root))


def test_garbage_while_running_is_a_collector_error(fake):
    watched = Watched(fake)
    for name in ("net/dev", "net/snmp", "net/snmp6", "stat", "meminfo", "vmstat"):
        kept = (fake.root / name).read_text()
        for text in ("", "x\n", kept[: len(kept) // 3], kept.replace("0", "?")):
            (fake.root / name).write_text(text)
            try:
                watched.collector.read([0] * len(LINUX_PROC_1))
            except CollectorError as error:
                assert str(error)
            (fake.root / name).write_text(kept)
    watched.step()


def test_without_ipv6_the_collector_says_so(fake):
    (fake.root / "net/snmp6").unlink()
    collector = ProcCollector(proc=str(fake.root))
    assert "no IPv6" in {group: note for group, _, note in collector.sources}["protocols"]
    collector.read([0] * len(LINUX_PROC_1))


def test_this_machine():
    collector = ProcCollector(interfaces=("lo",))
    window = Window(LINUX_PROC_1, 500)
    values = [0] * (len(LINUX_PROC_1) + 2)
    values[-2:] = [77, 78]
    collector.read(values)
    window.push(values[:-2], 0)
    _talk_on_loopback(20)
    time.sleep(0.05)
    collector.read(values)
    assert window.push(values[:-2], 500)
    deltas = dict(zip(COLUMNS, window.deltas, strict=True))
    assert values[-2:] == [77, 78]  # a longer schema's further columns are left alone
    assert deltas["conn_out"] >= 20
    assert deltas["conn_in"] >= 20
    assert deltas["listen_ports"] >= 1
    assert deltas["pkts_out"] >= 60
    assert 0 < deltas["mem_avail"] <= 25600
    assert 0 <= deltas["cpu_busy"] <= 25600
    collector.close()


def _talk_on_loopback(connections: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(connections):
            with socket.create_connection(server.getsockname()) as client:
                peer, _ = server.accept()
                client.sendall(b"hello")
                peer.recv(5)
                peer.close()


def test_both_ways_of_counting_listeners_agree():
    with socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0)):
        netlink, table = NetlinkListeners(), TableListeners()
        counted = netlink.count()
        assert counted >= 2
        assert table.count() == counted
        with socket.create_server(("127.0.0.1", 0)):
            assert netlink.count() == counted + 1
            assert table.count() == counted + 1
        netlink.close()
        table.close()


RSS_SCRIPT = """
import sys
from stonechat.linux.proc import ProcCollector
from stonechat.window import Window
collector = ProcCollector()
window = Window(collector.schema, 1000)
values = [0] * len(collector.schema)
for i in range(50):
    collector.read(values)
    window.push(values, 1000 * i)
unwanted = ("socket", "re", "json", "pathlib", "typing", "ctypes", "ssl", "asyncio")
heavy = [name for name in unwanted if name in sys.modules]
rss_kib = int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])
print(rss_kib, *heavy)
"""


def test_the_collector_process_stays_small():
    """15 MB for an agent before a transport is loaded; the collector, its window and the interpreter are most of it."""
    agent = str(Path(__file__).parents[2] / "agent")
    ran = subprocess.run(
        [sys.executable, "-S", "-c", RSS_SCRIPT],
        env={**os.environ, "PYTHONPATH": agent},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    rss_kib, *heavy = ran.stdout.split()
    assert not heavy
    assert int(rss_kib) < 15 * 1024, rss_kib


IN_A_NAMESPACE = """
import json, socket, struct, subprocess
from stonechat.linux.proc import ProcCollector
from stonechat.window import Window

def ip(*words): subprocess.run(["ip", *words], check=True, capture_output=True)

collector = ProcCollector()
window = Window(collector.schema, 1000)
names = [name for name, _, _ in collector.schema.columns]
values = [0] * len(names)
now_ms = 0
story = []

def step():
    global now_ms
    now_ms += 1000
    collector.read(values)
    if window.push(values, now_ms):
        story.append(dict(zip(names, window.deltas)))

def send(packets):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(packets): sock.sendto(bytes(100), ("10.9.9.9", 9))

def appear():
    ip("link", "add", "far0", "type", "veth", "peer", "far1"); ip("addr", "add", "10.9.0.1/16", "dev", "far0")
    ip("link", "set", "far1", "up"); ip("link", "set", "far0", "arp", "off", "up")

ip("link", "set", "lo", "up")
step()
appear(); step()
send(50); step()
ip("link", "delete", "far0"); step()
appear(); step()
send(7); step()
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
for n in range(5000): raw.sendto(struct.pack("!HHIIBBHHH", 4000, 23, n, 0, 0x50, 2, 1024, 0, 0), ("10.9.8.7", 0))
step()
for n in range(5000):
    with socket.socket() as sock:
        sock.connect_ex(("127.0.0.1", 9))
step()
print(json.dumps(story))
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a network namespace")
def test_a_real_interface_comes_and_goes_and_every_packet_counts_once():
    agent = str(Path(__file__).parents[2] / "agent")
    ran = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", IN_A_NAMESPACE],
        env={**os.environ, "PYTHONPATH": agent},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "Operation not permitted" in ran.stderr:
        pytest.skip("may not make a network namespace")
    assert not ran.returncode, ran.stderr
    appeared, sent, deleted, again, sent_again, raw, refused = json.loads(ran.stdout)
    assert 50 <= sent["pkts_out"] < 70  # the kernel's own IPv6 greetings are among them
    assert 50 * 128 <= sent["bytes_out"] < 70 * 200
    assert deleted["pkts_out"] == 0
    assert 7 <= sent_again["pkts_out"] < 27
    for window in (appeared, again):
        assert window["bytes_out"] < 2_000
    assert 5000 <= raw["ip_out_unattrib"] < 5010  # and, seldom, a multicast greeting
    assert refused["conn_out"] == refused["conn_fail"] == refused["rst_out"] == 5000
    assert refused["ip_out_unattrib"] < 10
