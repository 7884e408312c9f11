"""The workloads do what they say, end when they should, and leave nothing behind."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from stonechat.errors import ConfigError
from stonechat.linux import schemas
from stonechat.linux.cgroup_id import cgroup_root
from stonechat.linux.proc import ProcCollector
from stonechat.linux.sent_to_peers import SentToPeers
from stonechat_tools.evaluation import trial, trial_page
from stonechat_tools.lab import attack_acts, attacks, benign, guest, netns
from stonechat_tools.lab.bounds import Deadline, disk_folder, started, stopped
from stonechat_tools.lab.peers import FIRMWARE_BYTES, PAGE_BYTES, PORTS, Peers
from stonechat_tools.modeling.device_path import features_q8
from stonechat_tools.modeling.fit import fit
from stonechat_tools.traces.files import read_trace
from stonechat_tools.traces.format import TraceWriter

COLUMNS = [name for name, _, _ in schemas.LINUX_PROC_1.columns]
# attack: (counter, what it grows by at least within seconds)
SHOWS = {
    "scan_connect": ("conn_fail", 40),
    "scan_raw": ("ip_out_unattrib", 40),
    "udp_flood": ("udp_out", 500),
    "exfil_burst": ("bytes_out", 400_000),
    "exfil_slow": ("bytes_out", 3_900),
    "miner": ("cpu_busy", 2_000),
    "brute_in": ("conn_in", 3),
    "portsweep_in": ("rst_out", 20),
    "brute_out": ("conn_out", 3),
    "beacon": ("conn_out", 1),
    "forkbomb": ("forks", 10),
    "ransom": ("pages_dirtied", 100),
    "download_exec": ("bytes_in", FIRMWARE_BYTES),
    "scan_1ps": ("conn_fail", 1),
    "exfil_400Bps": ("bytes_out", 390),
    "exfil_via_known_peer": ("bytes_out", 1_900),
    "miner_5pct": ("ctxt", 1),
    "brute_in_1per5s": ("conn_in", 1),
    "ransom_1ps": ("pages_dirtied", 10),
    "beacon_60s_known": ("conn_out", 1),
    "shell_recon": ("forks", 5),
}


class Counters:
    """What the unprivileged collector counts on loopback, as growth since the start; shares as their highest."""

    def __init__(self) -> None:
        self._collector = ProcCollector(interfaces=("lo",))
        self._first = [0] * len(COLUMNS)
        self._collector.read(self._first)

    def grown(self) -> dict[str, int]:
        values = [0] * len(COLUMNS)
        self._collector.read(values)
        rows = zip(schemas.LINUX_PROC_1.columns, values, self._first, strict=True)
        return {name: value - (first if kind == "rate" else 0) for (name, _, kind), value, first in rows}

    def reach(self, **at_least: int) -> bool:
        """Whether each of these counters grows by so much before ten seconds are over."""
        for _ in range(100):
            grown = self.grown()
            if all(grown[name] >= least for name, least in at_least.items()):
                return True
            time.sleep(0.1)
        return False


def _may_send_raw() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP).close()
    except PermissionError:
        return False
    return True


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_each_attack_acts_and_stops_cleanly(name, tmp_path):
    if attacks.ATTACKS[name].privileged and not _may_send_raw():
        pytest.skip("needs CAP_NET_RAW")
    counters = Counters()
    process = attacks.spawn(name, 30, folder=disk_folder() if name.startswith("ransom") else str(tmp_path))
    counter, at_least = SHOWS[name]
    shown = counters.reach(**{counter: at_least})
    assert stopped(process) == 0
    assert shown, counters.grown()
    assert not list(tmp_path.iterdir())


def test_every_attack_has_a_counter_that_shows_it_and_features_that_exist():
    assert SHOWS.keys() == attacks.ATTACKS.keys()
    known = set(COLUMNS)
    with_bpf = {name for name, _, _ in (*schemas.LINUX_1.columns, *SentToPeers.schema.columns)}
    for name, attack in attacks.ATTACKS.items():
        assert set(attack.features) & known, name
        assert set(attack.features) & with_bpf, name
        assert not set(attack.features) - known - with_bpf, name


@pytest.mark.parametrize("name", ["scan_connect", "forkbomb", "ransom_1ps"])
def test_an_attack_ends_by_itself(name, tmp_path):
    process = attacks.spawn(name, 0.3, folder=str(tmp_path))
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert not list(tmp_path.iterdir())


def test_the_forkbomb_leaves_no_child_when_it_is_stopped(tmp_path):
    process = attacks.spawn("forkbomb", 60, folder=str(tmp_path))
    time.sleep(0.5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert 2 <= len(children) <= attack_acts.MAX_CHILDREN
    assert stopped(process) == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_a_workload_ends_with_its_parent(tmp_path):
    command = f"{sys.executable} -m {attacks.MODULE} scan_1ps --seconds 60 --folder {tmp_path} & echo $!; sleep 1"
    pid = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, timeout=30, check=True).stdout
    # run() returns once the pipe is closed: by the shell, and by the attack that noticed its absence.
    assert _gone(int(pid.split()[0]))
    assert not list(tmp_path.iterdir())


def _gone(pid: int) -> bool:
    """Ended, or about to be buried by whoever inherited it."""
    for _ in range(50):
        try:
            if ") Z" in Path(f"/proc/{pid}/stat").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_an_attack_that_may_not_begin_says_why(tmp_path):
    with pytest.raises(OSError, match="No such file or directory: '/nowhere"):
        attacks.spawn("ransom", 5, folder="/nowhere")
    ran = subprocess.run(
        [sys.executable, "-m", attacks.MODULE, "exfil_slow", "--target", "127.0.0.9", "--seconds", "1"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("exfil_slow: ")
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("kind", benign.KINDS)
def test_each_kind_of_device_works(kind):
    counters = Counters()
    process = benign.spawn(kind, 30, pace=30)
    shows = {"bytes_out": 20_000 if kind == "camera" else 100, "udp_out": 4 if kind == "gateway" else 0}
    shows["forks"] = 3 if any(benign.KINDS[kind].cron_s) else 0
    shown = counters.reach(conn_out=1, **shows)
    assert stopped(process) == 0
    assert shown, counters.grown()


def test_a_device_leaves_nothing_behind():
    process = benign.spawn("sensor", 30, pace=30)
    mine = f"stonechat-{process.pid}-"
    assert [name for name in os.listdir(disk_folder()) if name.startswith(mine)]
    assert stopped(process) == 0
    left = [name for name in os.listdir(disk_folder()) if name.startswith(mine)]
    assert not left


def test_a_device_goes_on_when_its_peers_are_gone():
    with contextlib.ExitStack() as stack:
        process = benign.spawn("sensor", 30, target="127.0.0.8")  # nobody serves there
        stack.callback(stopped, process)
        time.sleep(1.5)
        assert process.poll() is None


def test_peers_answer_as_their_services_do():
    with Peers() as peers:
        assert set(peers.ports) == set(PORTS)
        assert _talk(peers, "broker", b"\x32abc", 64) == b"\x40\x02\x00\x01"
        assert _talk(peers, "echo", b"hello", 5) == b"hello"
        assert _talk(peers, "login", b"root:1234", 64) == b"denied\n"
        for path, n_bytes in ((b"/settings", PAGE_BYTES), (b"/firmware", FIRMWARE_BYTES)):
            page = _talk(peers, "http", b"GET %s HTTP/1.0\r\n\r\n" % path, 10**7)
            assert len(page.partition(b"\r\n\r\n")[2]) == n_bytes
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.sendto(b"query", (peers.host, peers.ports["dns"]))
            assert sock.recv(512) == b"query" + bytes(40)
        # A client that resets in the middle of an answer does not stop the others.
        with socket.create_connection((peers.host, peers.ports["http"])) as sock:
            sock.sendall(b"GET /firmware HTTP/1.0\r\n\r\n")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        assert _talk(peers, "echo", b"still there", 11) == b"still there"
    with pytest.raises(OSError):
        socket.create_connection((peers.host, peers.ports["echo"]), 1)


def _talk(peers: Peers, service: str, data: bytes, at_most: int) -> bytes:
    answer = b""
    with socket.create_connection((peers.host, peers.ports[service]), 5) as sock:
        sock.sendall(data)
        while len(answer) < at_most and (chunk := sock.recv(65536)):
            answer += chunk
            if service not in ("http",):
                break
    return answer


def test_a_deadline_is_bounded_in_time_and_count():
    deadline = Deadline(60, max_events=3)
    events = 0
    while deadline.live():
        events += 1
        deadline.count()
    assert events == 3
    deadline = Deadline(0.05)
    deadline.sleep(30)
    assert not deadline.live()
    assert deadline.left_s() == 0


# attack: the counter in the device's namespace that it moves, where it is not IP's packets sent
ACROSS = dict.fromkeys(("brute_in", "brute_in_1per5s"), ("Tcp:", "PassiveOpens"))
ACROSS |= {"portsweep_in": ("Tcp:", "OutRsts"), "scan_connect": ("Tcp:", "AttemptFails")}
WITHOUT_NETWORK = ("forkbomb", "ransom", "ransom_1ps", "shell_recon")


@pytest.fixture(scope="module")
def net():
    """A pair of namespaces; the device offers a login."""
    try:
        with netns.pair(120) as there, contextlib.ExitStack() as stack:
            command = [*there.device, sys.executable, "-m", "stonechat_tools.lab.peers", "--bind", "0.0.0.0"]
            stack.callback(stopped, started(command))
            yield there
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.root
@pytest.mark.parametrize("name", [name for name in attacks.ATTACKS if name not in WITHOUT_NETWORK])
def test_an_attack_acts_across_a_network(net, name):
    at_device = attacks.ATTACKS[name].at_device
    target, prefix = (net.address, net.outside) if at_device else (net.network, net.device)
    row, counter = ACROSS.get(name, ("Ip:", "OutRequests"))
    first = _counted(net, row, counter)
    process = attacks.spawn(name, 30, target, prefix=prefix)
    try:
        for _ in range(100):
            grown = _counted(net, row, counter) - first
            if grown:
                break
            time.sleep(0.1)
    finally:
        status = stopped(process)
    assert status == 0
    assert grown > 0


def _counted(net: netns.Pair, row: str, counter: str) -> int:
    text = subprocess.run([*net.device, "cat", "/proc/net/snmp"], capture_output=True, text=True, check=True).stdout
    names, numbers = (line.split() for line in text.splitlines() if line.startswith(row))
    return int(numbers[names.index(counter)])


@pytest.mark.root
def test_the_namespaces_are_gone_afterwards():
    try:
        with netns.pair(60):
            assert len(_own_namespaces()) >= 2
            inside = set(_own_namespaces())
    except ConfigError as error:
        pytest.skip(str(error))
    assert len(inside - set(_own_namespaces())) == 2


def _own_namespaces() -> list[str]:
    return [name for name in os.listdir("/run/netns") if name.startswith(f"stonechat-{os.getpid()}-")]


class ScriptedStage:
    """Two windows of learning, the one that ends it, two benign ones and a false alarm; then an alarm in the third
    window of the first attack, and none in the four of the second; four of rest after each. Two windows end while each
    attack starts."""

    def __init__(self) -> None:
        calm = {"level": "normal", "learning": False, "evidence": 0.0, "surprise": 0.0, "explain": []}
        watch = {**calm, "evidence": 0.6, "explain": [{"feature": "forks"}]}
        alarm = {**calm, "level": "alarm", "evidence": 1.2, "explain": [{"feature": "syn_out"}]}
        rest = [calm] * trial.SETTLE_WINDOWS
        early = [{**alarm, "early": True}] * 2
        first, second = [*early, calm, watch, alarm, watch, *rest], [*early, calm, watch, calm, calm, calm, *rest]
        self._script = iter([{**calm, "learning": True}] * 2 + [calm] * 3 + [alarm] + first + second)

    def attacked(self, name: str):
        return contextlib.nullcontext()

    def window(self) -> dict[str, object]:
        deltas = list(range(len(schemas.LINUX_PROC_1)))
        verdict = next(self._script)
        time_s = 1.0 if verdict.get("early") else 4e9
        return {"verdict": verdict, "time_s": time_s, "elapsed_ms": 1000, "deltas": deltas}


def test_a_trial_counts_windows_to_alarm_and_false_alarms(tmp_path):
    with TraceWriter(tmp_path / "t.csv", schemas.LINUX_PROC_1, 1000, "d") as trace:
        one = trial.Trial("d", ScriptedStage(), trace)
        assert one.learn() == 2
        assert one.calm(3) == 1
        first = one.attack("scan_1ps", 4)
        second = one.attack("shell_recon", 4)
    assert (first["windows_to_alarm"], first["peak_evidence"], first["explained"]) == (3, 1.2, True)
    assert (second["windows_to_alarm"], second["peak_evidence"], second["top_features"]) == (None, 0.6, ["forks"])
    labels = read_trace(tmp_path / "t.csv").labels.tolist()
    assert labels == ["benign"] * 6 + ["scan_1ps"] * 3 + ["shell_recon"] * 4


def test_the_page_has_a_row_for_each_attack_and_a_column_for_each_kind():
    base = {"windows": 12, "peak_evidence": 0.4, "top_features": ["syn_out", "peers"], "windows_to_alarm": None}
    outcomes = [
        base | {"device": "sensor-1", "attack": "scan_1ps", "windows_to_alarm": 4},
        base | {"device": "plug-2", "attack": "scan_1ps", "windows_to_alarm": 2},
        base | {"device": "plug-2", "attack": "beacon"},
    ]
    figures = {
        "model": "m",
        "window_s": 5.0,
        "alarm_rules": [[1.0, 4.0, 6.0]],
        "learned_windows": 96,
        "attacks": outcomes,
    }
    later = {"devices": {"a-1": {}, "a-2": {}}, "false_alarms": 1, "benign_windows": 2016, "device_days": 0.11}
    later |= {"false_alarms_per_30d_at_most": 1220.4, "alarm_share": 0.004, "in_sample": False}
    text = trial_page.page(figures | {"false_alarms": 0, "benign_windows": 20}, "stonechat trial m.tflite", later)
    assert "(a-1, a-2) it raised 1 alarms in 2016 windows" in text
    assert "0.40 % of them in alarm: at most 1220 in 30 days" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows[0].split(" | ")[2:] == ["4", "2", "syn_out, peers |"]
    assert rows[1].split(" | ")[2:] == ["", "- (0.40 in 12)", " |"]
    assert "(1, 4, 6)" in text and "`stonechat trial m.tflite`" in text


def test_attacks_are_dealt_out_to_the_boxes_of_each_kind():
    names = ["a", "b", "c", "d", "e"]
    assert trial.deal(["x", "y"], names, 1) == [("x", names), ("y", names)]
    assert trial.deal(["x"], names, 2) == [("x", ["a", "b", "c"]), ("x", ["d", "e"])]
    dealt = trial.deal(["x", "y"], names, 9)
    assert {kind: sum((some for k, some in dealt if k == kind), []) for kind in "xy"} == {"x": names, "y": names}
    assert len(dealt) <= 9


@pytest.mark.root
@pytest.mark.parametrize("how", [["--boxes", "2"], ["--guests"]])
def test_a_trial_that_is_stopped_leaves_nothing(tmp_path, how):
    if os.geteuid():
        pytest.skip("needs root")
    if "--guests" in how and not shutil.which("linux.uml"):
        pytest.skip("guests need linux.uml: apt install user-mode-linux")
    elapsed = np.full(300, 1000)
    deltas = np.random.default_rng(1).poisson(50, (300, len(COLUMNS)))
    model = fit(features_q8(schemas.LINUX_PROC_1, deltas, elapsed, 1000), schemas.LINUX_PROC_1, 1000, learn_windows=0)
    (tmp_path / "model.tflite").write_bytes(model.to_tflite("trial-test", 1))
    command = [sys.executable, "-m", "stonechat_tools.cli", "trial", str(tmp_path / "model.tflite")]
    process = started([*command, *how, "--attacks", "scan_1ps,beacon"])  # its first line: what a device has learned
    there = _left_by(process.pid)
    assert stopped(process, 60) == 128 + signal.SIGTERM
    assert len(there) >= 3  # namespaces, an image, a mount
    assert not _left_by(process.pid)


@pytest.mark.root
def test_an_attack_acts_in_a_guest_as_long_as_it_is_let():
    if os.geteuid() or not shutil.which("linux.uml"):
        pytest.skip("needs root and linux.uml: apt install user-mode-linux")
    watcher = [sys.executable, "-m", "stonechat_tools.cli", "top", "--json", "--no-model", "--interval", "0.5"]
    workload = benign.command("plug", 60, netns.PEERS, netns.ROUTER)
    with guest.console(60, workload, [*watcher, "--collector", "proc"]) as console:

        def opened() -> float:
            return json.loads(console.windows.readline())["features"]["conn_out"]["value"]

        before = [opened() for _ in range(3)]
        console.start(attacks.command("scan_connect", 60, netns.NETWORK))
        during = [opened() for _ in range(6)]
        console.stop()
        opened()
        after = [opened() for _ in range(3)]
        with pytest.raises(OSError, match="did not start"):
            console.start([sys.executable, "-c", ""])
    assert max(before + after) < 20 < max(during)


def _left_by(pid: int) -> list[str]:
    name = f"stonechat-{pid}-"
    places = ("/run/netns", "/dev/shm", tempfile.gettempdir(), cgroup_root())
    found = [entry for place in places if os.path.isdir(place) for entry in os.listdir(place) if name in entry]
    mounted = [line for line in Path("/proc/self/mounts").read_text().splitlines() if name in line]
    images = [line for line in subprocess.getoutput("losetup --list").splitlines() if name in line]
    return found + mounted + images
