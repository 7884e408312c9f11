"""The Linux response on the real kernel, in network namespaces: what is stopped, what passes whatever is in force, and
that nothing stays."""

import contextlib
import errno
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from agent_process import readable_agent
from netns import needs_root
from stonechat.linux import netfilter, netfilter_rules, nfnetlink
from stonechat.linux.allow_list import AllowList
from stonechat.policy import QUARANTINE, THROTTLE
from stonechat_tools.lab import spaces

BROKER, OPERATOR, ATTACKER = "10.88.0.1", "10.88.0.5", "10.88.7.7"
PORT = 1883
LONG_S = 60
AF_PACKET = getattr(socket, "AF_PACKET", 17)


class Lab:
    """A response in a device's namespace. Its methods are carried out there."""

    def __init__(self, net: spaces.Pair, folder: Path, frames: bool = True) -> None:
        self.net = net
        (folder / "etc").mkdir()
        self.resolv = folder / "etc/resolv.conf"
        self.resolv.write_text("nameserver 10.88.0.53\nnameserver fd88::5\n")
        operator = [{"address": OPERATOR, "reason": "the office"}]
        self.allow = AllowList(BROKER, PORT, operator, root=str(folder), proc="/proc/thread-self")
        self.response = net.device.do(netfilter.Netfilter, self.allow, frames)

    def __getattr__(self, name: str):
        method = getattr(self.response, name)
        return lambda *arguments: self.net.device.do(method, *arguments)

    @property
    def tables(self) -> int:
        """How many tables of ours there are."""
        return self.net.device.do(_tables)


def _tables() -> int:
    kernel = nfnetlink.NfTables()
    found = 0
    for family in (nfnetlink.INET, nfnetlink.NETDEV):
        with contextlib.suppress(FileNotFoundError):
            found += sum(1 for _ in kernel.ask(nfnetlink.GET_TABLE, family, nfnetlink.text(1, "stonechat")))
    kernel.close()
    return found


@pytest.fixture(scope="module")
def net() -> Iterator[spaces.Pair]:
    if os.geteuid():
        pytest.skip("needs root: network namespaces")
    with spaces.pair() as made:
        yield made


@pytest.fixture
def lab(net: spaces.Pair, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(net, tmp_path)
    yield made
    made.close()
    assert made.tables == 0


def listener(space: spaces.Space, port: int, family: int = socket.AF_INET, kind: int = socket.SOCK_DGRAM):
    sock = space.do(socket.socket, family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", port))
    sock.settimeout(5)
    if kind == socket.SOCK_STREAM:
        sock.listen(8)
    return sock


def udp_passes(lab: Lab, host: str, port: int, source_port: int = 0) -> bool:
    """One datagram out of the device: did it arrive?"""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with listener(lab.net.outside, port, family) as there, lab.net.device.do(socket.socket, family, 2) as sock:
        sock.bind(("", source_port))
        try:
            sock.sendto(b"x", (host, port))
        except PermissionError:
            return False
        return there.recv(10) == b"x"


def tcp_passes(
    start: spaces.Space, end: spaces.Space, host: str, port: int, source: str = "", wait_s: float = 0.5
) -> bool:
    """A new connection between the two within wait_s, with a byte each way. The kernel repeats a lost SYN after 1 s."""
    with listener(end, port, kind=socket.SOCK_STREAM) as there, start.do(socket.socket) as sock:
        sock.settimeout(wait_s)
        if source:
            sock.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND
            sock.bind((source, 0))
        try:
            sock.connect((host, port))
        except (PermissionError, TimeoutError):
            return False
        with there.accept()[0] as accepted:
            accepted.sendall(b"x")
            sock.settimeout(5)
            return sock.recv(1) == b"x"


def ipv4(host: str, source_port: int, port: int, data: bytes = b"x") -> bytes:
    """An IPv4 packet with UDP, no checksum of UDP."""
    udp = struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0)
    head += socket.inet_aton(spaces.DEVICE) + socket.inet_aton(host)
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:] + udp


def frame_passes(lab: Lab, packet: bytes, kind: bytes = b"\x08\x00", declared: int = 0, tag: bytes = b"") -> bool:
    """One frame by AF_PACKET: does the other end of the pair see it? kind: in the frame; declared: to the kernel."""
    mark = os.urandom(8)
    there = lab.net.outside.do(socket.socket, AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    here = lab.net.device.do(socket.socket, AF_PACKET, socket.SOCK_RAW, 0)
    with there, here:
        there.bind((spaces.INTERFACE, 0x0003))
        there.settimeout(0.3)
        here.bind((spaces.INTERFACE, declared))
        try:
            here.send(b"\xff" * 6 + b"\x02\0\0\0\0\x01" + tag + kind + packet + mark)
        except PermissionError:
            return False
        except OSError as error:
            assert error.errno in (1, 105), error
            return False
        deadline_s = time.monotonic() + 5
        while time.monotonic() < deadline_s:
            try:
                if there.recv(2048).endswith(mark):
                    return True
            except TimeoutError:
                return False
    return False


@needs_root
def test_looking_changes_nothing_and_release_is_safe_at_any_time(lab):
    assert lab.tables == 0
    lab.release()
    assert lab.counts() == (0, 0)
    assert lab.turn() == ""
    assert "nf_tables" in lab.response.source


@needs_root
@pytest.mark.parametrize("action", [QUARANTINE, THROTTLE])
def test_the_allow_list_passes_whatever_is_in_force(lab, action):
    device, outside = lab.net.device, lab.net.outside
    with listener(outside, PORT, kind=socket.SOCK_STREAM) as there, device.do(socket.socket) as broker:
        broker.connect((BROKER, PORT))
        with there.accept()[0] as accepted:
            lab.apply(action, LONG_S)
            for _ in range(60):  # above every limit
                broker.sendall(bytes(20_000))
                wanted = 20_000
                while wanted:
                    wanted -= len(accepted.recv(wanted))
    assert tcp_passes(device, outside, BROKER, PORT)
    assert udp_passes(lab, "10.88.0.53", 53)
    assert udp_passes(lab, "fd88::5", 53)
    assert tcp_passes(device, outside, "10.88.0.53", 53)
    assert udp_passes(lab, spaces.GATEWAY, 9999)
    assert udp_passes(lab, spaces.GATEWAY6, 9999)
    assert udp_passes(lab, OPERATOR, 4444)
    assert tcp_passes(device, outside, OPERATOR, 8080)
    assert tcp_passes(outside, device, spaces.DEVICE, 22, source=OPERATOR)
    assert udp_passes(lab, "10.88.9.9", 67, source_port=68)
    assert udp_passes(lab, ATTACKER, 123)  # a time server that nobody has named, within limits
    assert udp_passes(lab, "fd88::77", 547, source_port=546)
    assert frame_passes(lab, ipv4("255.255.255.255", 68, 67))  # a DHCP client's own
    assert frame_passes(lab, ipv4(OPERATOR, 1000, 1000))
    assert frame_passes(lab, bytes(28), b"\x08\x06")  # ARP
    assert frame_passes(lab, bytes(46), b"\x88\x92")  # a field bus
    assert tcp_passes(device, device, "127.0.0.1", 4321)


def echoes(lab: Lab, host: str, size: int) -> bool:
    """A datagram of `size` bytes to port 53 of `host` and back."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with lab.net.outside.do(socket.socket, family, 2) as there, lab.net.device.do(socket.socket, family, 2) as sock:
        freebind = (socket.IPPROTO_IPV6, 78) if ":" in host else (socket.IPPROTO_IP, 15)
        there.setsockopt(*freebind, 1)
        there.bind((host, 53))
        there.settimeout(0.5)
        sock.settimeout(0.5)
        sock.connect((host, 53))
        try:
            sock.send(bytes(size))
            there.sendto(*there.recvfrom(9000))
            return len(sock.recv(9000)) == size
        except (PermissionError, TimeoutError):
            return False


@needs_root
@pytest.mark.parametrize("routed", [True, False])
def test_a_long_answer_of_a_name_server_passes_in_fragments(lab, routed):
    lab.response.routed = lab.response.routed and routed
    lab.apply(QUARANTINE, LONG_S)
    for host, passes in (("10.88.0.53", True), ("fd88::5", True), (ATTACKER, False), ("fd88::77", False)):
        for size in (100, 4000):  # 100 bytes: in one packet
            assert echoes(lab, host, size) == passes, (host, size)


@needs_root
def test_quarantine_stops_all_else_and_the_kernel_ends_it(lab):
    device, outside = lab.net.device, lab.net.outside
    assert udp_passes(lab, ATTACKER, 9)
    with listener(outside, 443, kind=socket.SOCK_STREAM) as there, device.do(socket.socket) as old:
        old.connect((ATTACKER, 443))
        with there.accept()[0] as accepted:
            began_s = time.monotonic()
            lab.apply(QUARANTINE, 3)
            old.sendall(b"x")
            accepted.settimeout(0.3)
            with pytest.raises(TimeoutError):
                accepted.recv(1)
    assert not udp_passes(lab, ATTACKER, 9)
    assert not udp_passes(lab, "fd88::77", 9)
    assert not udp_passes(lab, BROKER, 9)  # the broker's other ports
    assert not udp_passes(lab, "10.88.0.53", 5353)
    assert not udp_passes(lab, spaces.DEVICE.replace(".2", ".77"), 9)
    assert not tcp_passes(outside, device, spaces.DEVICE, 22, source=ATTACKER)
    echo = struct.pack("!BBHHH", 8, 0, 0, 1, 1)
    for protocol, packet in ((socket.IPPROTO_RAW, ipv4(ATTACKER, 1, 1)), (socket.IPPROTO_ICMP, echo)):
        raw = device.do(socket.socket, socket.AF_INET, socket.SOCK_RAW, protocol)
        with raw, pytest.raises(PermissionError):
            raw.sendto(packet, (ATTACKER, 0))
    passed, stopped = lab.counts()
    assert passed == 0
    assert stopped >= 7
    while not udp_passes(lab, ATTACKER, 9):
        assert time.monotonic() < began_s + 3.5
        time.sleep(0.01)
    assert time.monotonic() > began_s + 2.9
    assert lab.counts()[1] >= stopped


@needs_root
@pytest.mark.parametrize(
    ("packet", "options"),
    [
        (ipv4(ATTACKER, 1, 1), {}),
        (ipv4(ATTACKER, 1, 1), {"declared": 0x0806}),
        (ipv4(ATTACKER, 1, 1), {"declared": 0x88CC}),
        (ipv4(ATTACKER, 1, 1), {"tag": b"\x81\x00\0\0"}),
        (ipv4(ATTACKER, 1, 1), {"tag": b"\x88\xa8\0\0\x81\0\0\0"}),
        (b"\x60" + bytes(3) + b"\0\x08\x11\x40" + bytes(32) + bytes(8), {"kind": b"\x86\xdd"}),
        (ipv4(BROKER, 1, 9), {}),
    ],
    ids=["plain", "said to be ARP", "said to be LLDP", "tagged", "tagged twice", "IPv6", "another port"],
)
def test_quarantine_stops_frames_that_go_past_ip(lab, packet, options):
    if lab.response.frames:
        pytest.skip(lab.response.frames)
    assert frame_passes(lab, packet, **options)
    lab.apply(QUARANTINE, LONG_S)
    assert not frame_passes(lab, packet, **options)
    assert lab.counts()[1] >= 1


@needs_root
def test_an_interface_that_comes_later_is_covered(lab):
    if lab.response.frames:
        pytest.skip(lab.response.frames)
    lab.apply(QUARANTINE, LONG_S)
    assert not frame_passes(lab, ipv4(ATTACKER, 1, 1))
    lab.net.device.ip("link add late0 type veth peer name late1", "link set late0 up")
    try:
        assert lab.turn() == ""
        with lab.net.device.do(socket.socket, AF_PACKET, socket.SOCK_RAW, 0) as sock:
            sock.bind(("late0", 0))
            with pytest.raises(OSError, match="ermitted|buffer"):
                sock.send(b"\xff" * 6 + b"\x02\0\0\0\0\x01\x08\x00" + ipv4(ATTACKER, 1, 1))
        assert lab.counts()[1] >= 2  # also those from before
    finally:
        lab.net.device.ip("link del late0")
    assert lab.turn() == ""
    assert not udp_passes(lab, ATTACKER, 9)


@needs_root
def test_without_the_egress_chain_the_rest_works_and_says_so(net, tmp_path):
    lab = Lab(net, tmp_path, frames=False)
    try:
        assert "without AF_PACKET" in lab.response.source
        lab.apply(QUARANTINE, LONG_S)
        assert lab.tables == 1
        assert not udp_passes(lab, ATTACKER, 9)
        assert frame_passes(lab, ipv4(ATTACKER, 1, 1))
    finally:
        lab.close()
    assert lab.tables == 0


@needs_root
def test_throttle_limits_and_counts(lab):
    lab.apply(THROTTLE, LONG_S)
    with lab.net.device.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        refused = 0
        for _ in range(1000):
            try:
                sock.sendto(b"x", (ATTACKER, 9))
            except PermissionError:
                refused += 1
    began = 0
    for _ in range(200):
        with lab.net.device.do(socket.socket) as sock:
            sock.setblocking(False)
            began += sock.connect_ex((ATTACKER, 23)) == 115  # EINPROGRESS
    burst = netfilter_rules.LIMITS["datagrams"][1]
    assert 1000 - 2 * burst < refused <= 1000 - burst + 5
    passed, stopped = lab.counts()
    assert stopped >= refused + 100
    assert passed >= burst - 5
    assert began == 200  # what is stopped looks like a lost packet to TCP, which tries again


@needs_root
def test_a_stronger_response_replaces_a_weaker_one_and_a_change_of_the_list_is_followed(lab):
    lab.apply(THROTTLE, LONG_S)
    assert udp_passes(lab, ATTACKER, 9)
    lab.apply(QUARANTINE, LONG_S)
    assert not udp_passes(lab, ATTACKER, 9)
    assert not udp_passes(lab, "10.88.0.54", 53)
    stopped = lab.counts()[1]
    lab.resolv.write_text("nameserver 10.88.0.54\n")
    assert lab.turn() == ""
    assert udp_passes(lab, "10.88.0.54", 53)
    assert not udp_passes(lab, "10.88.0.53", 53)
    assert lab.counts()[1] > stopped
    lab.net.device.ip(f"route change default via {spaces.GATEWAY} src {spaces.DEVICE} metric 0")
    assert lab.turn() == ""
    lab.release()
    assert udp_passes(lab, ATTACKER, 9)


@needs_root
def test_the_end_is_prolonged_and_not_past_it(lab):
    lab.apply(QUARANTINE, 1)
    time.sleep(0.6)
    lab.extend(2)
    time.sleep(0.8)
    assert not udp_passes(lab, ATTACKER, 9)
    time.sleep(1.3)
    assert udp_passes(lab, ATTACKER, 9)
    with pytest.raises(OSError, match="it has ended|nothing is in force"):
        lab.extend(2)
    assert lab.tables == 0


@needs_root
@pytest.mark.parametrize("action", [QUARANTINE, THROTTLE])
def test_what_a_gateway_forwards_for_its_clients_is_not_touched(lab, action):
    client = spaces.Space()
    lan = f"lan{action}"  # the other test's may still be on its way out
    try:
        client.ip(
            f"link add lan type veth peer name {lan} netns {lab.net.device.path}",
            "addr add 10.77.0.2/24 dev lan",
            "link set lan up",
            "route add default via 10.77.0.1",
        )
        lab.net.device.ip(f"addr add 10.77.0.1/24 dev {lan}", f"link set {lan} up")
        lab.net.outside.ip(f"route replace 10.77.0.0/24 via {spaces.DEVICE}")
        forward = Path("/proc/sys/net/ipv4/ip_forward")
        lab.net.device.do(forward.write_text, "1")
        lab.apply(action, LONG_S)
        assert all(tcp_passes(client, lab.net.outside, ATTACKER, 4001, wait_s=5) for _ in range(40))
        assert all(tcp_passes(lab.net.outside, client, "10.77.0.2", 4002, wait_s=5) for _ in range(40))
        tries = 60 if action == THROTTLE else 1
        assert not all(tcp_passes(lab.net.device, lab.net.outside, ATTACKER, 4003) for _ in range(tries))
    finally:
        lab.release()
        lab.net.outside.ip("route flush 10.77.0.0/24")
        client.close()
        lab.net.device.do(forward.write_text, "0")


@needs_root
def test_a_start_without_a_response_leaves_the_tables_of_an_agent_that_responds(lab):
    lab.apply(QUARANTINE, LONG_S)
    claim = lab.net.device.do(netfilter._claim)
    lab.net.device.do(netfilter.clear_before_a_start)
    assert lab.tables > 0
    claim.close()
    lab.net.device.do(netfilter.clear_before_a_start)
    assert lab.tables == 0


SQUATTER = """
import os, socket, sys
os.setuid(65534)
taken = socket.socket(socket.AF_UNIX)
taken.bind(b"\\0stonechat-response")
if sys.argv[1] == "listens":
    taken.listen(0)
    sockets = []
    for _ in range(20):
        one = socket.socket(socket.AF_UNIX)
        one.setblocking(False)
        try:
            one.connect(b"\\0stonechat-response")
        except OSError:
            break
        sockets.append(one)
print(flush=True)
sys.stdin.read()
"""


@needs_root
def test_one_agent_responds_in_a_namespace_and_who_is_not_root_keeps_none_from_it(lab, tmp_path):
    first = lab.net.device.do(netfilter._claim)
    for _ in range(20):  # each leaves a connection that the first one has not taken
        try:
            lab.net.device.do(netfilter._claim)
        except OSError as error:
            assert error.errno == errno.EBUSY and "another stonechat-agent" in str(error)
    other = netfilter.Netfilter(AllowList("127.0.0.1", 1, []), claim=first)
    for _ in range(30):
        other.turn()
    with pytest.raises(OSError, match="another stonechat-agent"):
        lab.net.device.do(netfilter._claim)
    lab.net.outside.do(netfilter._claim).close()  # another namespace
    ending = threading.Timer(0.3, other.detach)
    ending.start()
    lab.net.device.do(netfilter._claim_in_time).close()  # the first one ends meanwhile
    ending.join()
    for how in ("listens", "is deaf"):
        command = [sys.executable, "-c", SQUATTER, how]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with lab.net.device.do(lambda command=command, pipes=pipes: subprocess.Popen(command, **pipes)) as squatter:
            squatter.stdout.readline()
            assert lab.net.device.do(netfilter._claim) is None
            squatter.stdin.close()
    lab.net.device.do(netfilter._claim).close()


@needs_root
def test_what_could_not_be_taken_away_is_tried_again(lab, monkeypatch):
    lab.apply(QUARANTINE, LONG_S)
    kernel = lab.response._kernel
    run = kernel.run

    def refused(*_):
        raise OSError(errno.ENOBUFS, "no buffer space")

    monkeypatch.setattr(kernel, "run", refused)
    with pytest.raises(OSError, match="no buffer space"):
        lab.release()
    assert lab.turn() == "" and lab.tables > 0
    monkeypatch.setattr(kernel, "run", run)
    assert lab.turn() == "" and lab.tables == 0
    assert udp_passes(lab, ATTACKER, 9)


@needs_root
def test_the_longest_allow_list_fits(net):
    rng = random.Random(3)
    entries = [(rng.randbytes(16), 128, 6, 8883) for _ in range(300)]

    def run() -> None:
        kernel, batch = nfnetlink.NfTables(), nfnetlink.Batch()
        netfilter_rules.add_table(
            batch, nfnetlink.INET, netfilter_rules.chains(entries, netfilter_rules.LIMITS), [], QUARANTINE, 1000
        )
        try:
            kernel.run(batch, commit=False)
        finally:
            kernel.close()

    net.device.do(run)


def _delete_tables() -> None:
    kernel, batch = nfnetlink.NfTables(), nfnetlink.Batch()
    for family in (nfnetlink.INET, nfnetlink.NETDEV):
        netfilter_rules.delete_table(batch, family)
    kernel.run(batch)
    kernel.close()


def _change(kind: int, *parts: bytes) -> None:
    kernel, batch = nfnetlink.NfTables(), nfnetlink.Batch()
    batch.add("change", kind, nfnetlink.INET, nfnetlink.text(1, "stonechat"), *parts)
    kernel.run(batch)
    kernel.close()


@needs_root
@pytest.mark.parametrize(
    "deed",
    [
        _delete_tables,
        lambda: _change(8),  # NFT_MSG_DELRULE of all chains
        lambda: _change(14, nfnetlink.text(2, "quarantine")),  # NFT_MSG_DELSETELEM of all
    ],
)
def test_deleted_from_outside_is_reported_ends_it_and_does_not_hinder_the_next(lab, deed):
    lab.apply(QUARANTINE, LONG_S)
    lab.net.device.do(deed)
    assert "from outside" in lab.turn()
    assert udp_passes(lab, ATTACKER, 9)
    assert lab.tables == 0
    assert lab.turn() == ""
    with pytest.raises(OSError, match="nothing is in force"):
        lab.extend(5)
    lab.apply(QUARANTINE, LONG_S)
    assert not udp_passes(lab, ATTACKER, 9)


@needs_root
def test_tables_of_others_are_none_of_our_business(lab):
    lab.apply(QUARANTINE, LONG_S)

    def other(kind: int) -> None:
        kernel, batch = nfnetlink.NfTables(), nfnetlink.Batch()
        batch.add("table", kind, nfnetlink.INET, nfnetlink.text(1, "other"))
        kernel.run(batch)
        kernel.close()

    lab.net.device.do(other, nfnetlink.NEW_TABLE)
    try:
        assert lab.turn() == ""
        assert not udp_passes(lab, ATTACKER, 9)
        lab.release()
    finally:
        lab.net.device.do(other, nfnetlink.DELETE_TABLE)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from stonechat.linux import privileges
from stonechat.linux.allow_list import AllowList
from stonechat.linux.netfilter import Netfilter
privileges.drop("nobody", keep_net_admin=sys.argv[2] == "keep")
try:
    response = Netfilter(AllowList("10.88.0.1", 1883, []))
    response.release()
    response.apply(3, int(sys.argv[3]))
except OSError as error:
    print(error, flush=True)
    sys.exit(3)
print(privileges.status(), flush=True)
time.sleep(60)
"""


def agent(net: spaces.Pair, *arguments: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-I", "-c", KILLED, str(readable_agent()), *arguments]
    return net.device.do(lambda: subprocess.Popen(words, stdout=subprocess.PIPE, text=True))


@needs_root
def test_a_killed_agent_s_quarantine_ends_and_the_next_start_takes_the_rest_away(lab):
    """The agent is an ordinary user that holds CAP_NET_ADMIN and nothing else."""
    process = agent(lab.net, "keep", "2")
    began_s = time.monotonic()
    assert process.stdout is not None
    assert process.stdout.readline() == f"(65534, {1 << 12}, {1 << 12}, 0, 0)\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not udp_passes(lab, ATTACKER, 9)
    while not udp_passes(lab, ATTACKER, 9):
        assert time.monotonic() < began_s + 30
        time.sleep(0.02)
    assert time.monotonic() - began_s > 1.5
    assert lab.tables == 2 - bool(lab.response.frames)
    lab.release()  # what a Lease does at its start
    assert lab.tables == 0


@needs_root
def test_without_the_capability_there_is_one_clear_line(net):
    process = agent(net, "none", "1")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "CAP_NET_ADMIN" in printed
    assert printed.count("\n") == 1


# --- hostile and broken answers of the kernel -------------------------------------------------------------------------


def test_no_answer_breaks_the_parsers():
    rng = random.Random(1)
    for _ in range(3000):
        data = bytearray(rng.randbytes(rng.randrange(80)))
        if rng.random() < 0.5 and len(data) >= 8:
            struct.pack_into("=HH", data, 0, rng.choice((4, 8, len(data), len(data) + 1)), rng.randrange(8))
        try:
            found = nfnetlink.attributes(data, 0, len(data))
            for start, end in found.values():
                assert 0 <= start <= end <= len(data)
                nfnetlink.elements(data, (start, end))
            for kind in found:
                nfnetlink.number(data, found, kind)
        except OSError as error:
            assert error.errno == errno.EBADMSG


class Answering:
    """A netlink socket that answers with what it was given."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.wait_s = 1.0

    def settimeout(self, wait_s: float) -> None:
        self.wait_s = wait_s

    def send(self, data: bytes) -> int:
        return len(data)

    def recv_into(self, buffer: bytearray) -> int:
        if not self.wait_s:
            raise BlockingIOError
        if not self.answers:
            raise TimeoutError
        answer = self.answers.pop(0)
        buffer[: len(answer)] = answer
        return len(answer)


def kernel_with(*answers: bytes) -> nfnetlink.NfTables:
    kernel = nfnetlink.NfTables()
    kernel.close()
    kernel._netlink = Answering(*answers)  # type: ignore[assignment]
    return kernel


def message(sequence: int, code: int, kind: int = 2, flags: int = 0, more: bytes = b"") -> bytes:
    body = struct.pack("=i", code) + bytes(16) + more
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


@needs_root
def test_answers_that_lie_end_in_an_error():
    with pytest.raises(OSError, match="does not answer"):
        list(kernel_with().ask(nfnetlink.GET_TABLE, 1))
    with pytest.raises(OSError, match="message of"):
        list(kernel_with(struct.pack("=IHHII", 3, 2, 0, 0, 0)).ask(nfnetlink.GET_TABLE, 1))
    with pytest.raises(OSError, match="message of"):
        list(kernel_with(struct.pack("=IHHII", 999, 2, 0, 0, 0)).ask(nfnetlink.GET_TABLE, 1))
    with pytest.raises(OSError, match="does not end"):
        list(kernel_with(*[b""] * (nfnetlink.MAX_ANSWERS + 1)).ask(nfnetlink.GET_TABLE, 1))
    endless = [message(7, 0)] * (nfnetlink.MAX_ANSWERS + 1)
    with pytest.raises(OSError, match="does not end"):
        list(kernel_with(*endless).ask(nfnetlink.GET_TABLE, 1))
    kernel = kernel_with()
    said = struct.pack("=HH", 4 + 300, 1) + b"z" * 300
    kernel._netlink.answers = [message(kernel._sequence + 1, -95, flags=0x300, more=said)]  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="no support.*zzz") as caught:
        list(kernel.ask(nfnetlink.GET_TABLE, 1))
    assert len(str(caught.value)) < 400
    kernel = kernel_with()
    lie = struct.pack("=HH", 999, 1)
    kernel._netlink.answers = [message(kernel._sequence + 1, -95, flags=0x300, more=lie)]  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="attribute of"):
        list(kernel.ask(nfnetlink.GET_TABLE, 1))


@needs_root
def test_what_works_here_leaves_another_agent_s_tables_alone(lab):
    lab.apply(QUARANTINE, LONG_S)
    assert lab.net.device.do(netfilter.what_works) == lab.response.source
    assert lab.turn() == ""
    assert not udp_passes(lab, ATTACKER, 9)
    lab.net.device.do(netfilter.clear)
    assert lab.tables == 0


@needs_root
def test_a_refused_batch_names_what_was_refused(net):
    def run() -> None:
        kernel, batch = nfnetlink.NfTables(), nfnetlink.Batch()
        batch.add("table", nfnetlink.NEW_TABLE, nfnetlink.INET, nfnetlink.text(1, "refused"))
        batch.add("chain of nothing", nfnetlink.NEW_CHAIN, nfnetlink.INET, nfnetlink.text(1, "missing"))
        batch.add("table", nfnetlink.NEW_TABLE, nfnetlink.INET, nfnetlink.text(1, "refused"))
        try:
            kernel.run(batch)
        finally:
            kernel.close()

    with pytest.raises(OSError, match="chain of nothing"):
        net.device.do(run)
    found = net.device.do(lambda: SimpleNamespace(tables=_tables()))
    assert found.tables == 0


def test_interfaces_to_containers_do_not_push_out_the_others(monkeypatch):
    names = [(n, name) for n, name in enumerate(["wlan0", "lo", *[f"veth{n:04x}" for n in range(300)], "eth0"])]
    monkeypatch.setattr(netfilter._socket, "if_nameindex", lambda: names)
    found = netfilter.Netfilter._names()
    assert {"wlan0", "eth0"} <= set(found) and "lo" not in found and len(found) == netfilter.MAX_DEVICES
