"""The demo's Linux device: a simulated gateway at work in a network of its own, watched by the real daemon.

As root it is a box of the laboratory (lab/box.py): a network namespace, a cgroup and a disk of its own, watched with
BPF by schema linux-1. As an ordinary user it is a user and network namespace, watched by linux-proc-1 with a model that
ignores what /proc only gives for the whole machine. Where neither can be made, there is no Linux device.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stonechat.errors import ConfigError
from stonechat.linux.schemas import LINUX_1, LINUX_PROC_1
from stonechat.model import load_model

from stonechat_tools.fleet.wire import Report
from stonechat_tools.lab import attacks, benign, box, netns
from stonechat_tools.lab.bounds import stopped

from .scenario import Feed, Infection

NAME = "gateway"
ORDINARY = 24
MODELS = {"linux-1": "linux-1-demo", "linux-proc-1": "linux-proc-1-demo"}
LONGEST_S = 1800.0  # the workload ends by itself, whatever becomes of the demo
PATIENCE_S = 60.0
NICE = -10  # of the device, its peers and its agent, as root: the machine's other work takes no time from them
# A session of its own, because the kernel may share the processors out among sessions first (sched_autogroup): a nice
# value then counts within the session only.
OWN_SESSION = ("setsid", "sh", "-c", f'(echo {NICE} > /proc/self/autogroup) 2>/dev/null; exec "$@"', "sh")
_BEAT_S = 0.05
_LATE_S = 0.1  # a process that sleeps for _BEAT_S and wakes up so much later has waited for a processor
LOAD_EACH = 4.0  # processes that want each processor, by the load average: a compiler and a busy loop are 1 on two
LATE_SHARE = 0.03  # of the beats: where more are late, the device did not get its time, and nothing follows from it
ATTACKS_BY_SCHEMA = {
    "linux-1": ("scan_connect", "exfil_burst", "ransom", "miner", "portsweep_in"),
    "linux-proc-1": ("scan_connect", "udp_flood", "exfil_burst", "portsweep_in", "brute_in"),
}
APART = {
    "linux-1": "its own cgroup and network, watched with BPF",
    "linux-proc-1": "its own network namespace; only that is watched",
}
WHAT = {
    "scan_connect": "scans for telnet logins, like Mirai",
    "udp_flood": "floods a victim with UDP",
    "exfil_burst": "sends 2 MB a second to a stranger",
    "ransom": "encrypts files as fast as it can",
    "miner": "mines a cryptocurrency",
    "portsweep_in": "has its ports scanned by a stranger",
    "brute_in": "has its login guessed by a stranger",
}


@dataclass(frozen=True)
class Place:
    """Where the device lives. inside, watching: command prefixes of its processes and of its agent; cgroup, disk: empty
    where it has none of its own; folder: where it writes; before: the prefix of what comes from outside."""

    schema: str
    net: netns.Pair
    inside: tuple[str, ...]
    watching: tuple[str, ...]
    cgroup: str
    disk: str
    folder: str
    before: tuple[str, ...] = ()


@contextlib.contextmanager
def place(scratch: Path) -> Iterator[Place]:
    """The best place that can be made here. Raises ConfigError with the reason where there is none."""
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            with preferred():
                made = stack.enter_context(box.box(LONGEST_S, before=OWN_SESSION))
            _, disk, _, cgroup = made.options
            watching = (*made.watching, *OWN_SESSION)
            yield Place("linux-1", made.net, made.inside, watching, cgroup, disk, made.folder, OWN_SESSION)
        else:
            net = stack.enter_context(netns.pair(LONGEST_S))
            folder = scratch / "gateway"
            folder.mkdir()
            watching = (*net.device, "unshare", "--user")  # nobody in there, without a capability
            yield Place("linux-proc-1", net, net.device, watching, "", "", str(folder))


@contextlib.contextmanager
def preferred() -> Iterator[None]:
    """As root, what this thread starts meanwhile is preferred to the machine's other work."""
    if os.geteuid():
        yield
        return
    before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        with contextlib.suppress(OSError):  # root without CAP_SYS_NICE
            os.setpriority(os.PRIO_PROCESS, 0, NICE)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


_BEATS = """
import sys, time
beats = late = written = 0
beat_s, late_s = float(sys.argv[1]), float(sys.argv[2])
while True:
    before_s = time.monotonic()
    time.sleep(beat_s)
    beats += 1
    late += time.monotonic() - before_s - beat_s > late_s
    if beats % 4 == 0 or late != written:
        written = late
        print(beats, late, flush=True)
"""


class Beats:
    """How long a process like the device's waits for a processor, measured by one that only sleeps and wakes up."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._last = "0 0"

    def __enter__(self) -> "Beats":
        with preferred():
            before = OWN_SESSION if os.geteuid() == 0 else ()
            words = [*before, sys.executable, "-c", _BEATS, str(_BEAT_S), str(_LATE_S)]
            self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def late(self) -> int:
        """How many were late so far."""
        return int(self._last.split()[1])

    def late_share(self) -> float:
        beats, late = map(int, self._last.split())
        return late / max(1, beats)

    def _read(self) -> None:
        if self._process and self._process.stdout:
            for line in self._process.stdout:
                self._last = line


class Gateway:
    """Runs while the `with` block does. folder: of the agent's files, open to the user that it becomes."""

    def __init__(self, there: Place, folder: Path, model: Path, broker_port: int, secret: bytes, feed: Feed) -> None:
        metadata = load_model(model.read_bytes()).metadata
        schema = LINUX_1 if there.schema == "linux-1" else LINUX_PROC_1
        self.name = NAME
        self.title = f"a Linux device in {APART[there.schema]}"
        self.learn_windows = metadata.learn_windows
        self.window_s = metadata.window_ms / 1000
        self.ordinary = ORDINARY
        self.columns = [column[0] for column in schema.columns]
        self.infections = [
            Infection(name, WHAT[name], attacks.ATTACKS[name].features) for name in ATTACKS_BY_SCHEMA[there.schema]
        ]
        self._there = there
        self._folder = folder
        self._model = model
        self._broker_port = broker_port
        self._secret = secret
        self._feed = feed
        self._stack = contextlib.ExitStack()
        self._agent: subprocess.Popen[bytes] | None = None
        self._attack: subprocess.Popen[str] | None = None
        self._beats = Beats()
        self._late = 0
        self._load = 0.0  # the highest
        self.disturbed = False
        self.cpu_percent = 0.0
        self.rss_bytes = 0

    def __enter__(self) -> "Gateway":
        there = self._there
        try:
            port = self._stack.enter_context(relay(there.net.device, self._broker_port))
            with preferred():
                day = benign.spawn("meter", LONGEST_S, there.net.peers, prefix=there.inside)
                self._stack.callback(stopped, day)
                self._agent = self._start(port)
            self._stack.callback(self._stop)
            self._started_s = time.monotonic()
            self._stack.enter_context(self._beats)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.recover()
        self._stack.close()

    @property
    def starved(self) -> bool:
        return self._beats.late_share() > LATE_SHARE or self._load > LOAD_EACH * (os.cpu_count() or 1)

    def window(self) -> Report:
        report = self._feed.next(PATIENCE_S, self._why_dead)
        before, self._late = self._late, self._beats.late()
        self.disturbed = self._late > before
        self._load = max(self._load, os.getloadavg()[0])
        return report

    def infect(self, name: str) -> None:
        at_device = attacks.ATTACKS[name].at_device
        net = self._there.net
        prefix = (*net.outside, *self._there.before) if at_device else self._there.inside
        target = net.address if at_device else net.network
        with preferred():
            self._attack = attacks.spawn(name, LONGEST_S, target, folder=self._there.folder, prefix=prefix)

    def recover(self) -> None:
        if self._attack:
            stopped(self._attack)
            self._attack = None
            if self._there.disk:  # what it wrote goes to the disk now, not into some later ordinary window
                subprocess.run(["sync", "--file-system", self._there.folder], check=False, timeout=60)

    def end(self) -> int:
        """End the agent in good order -> how many reports it published, by its own account."""
        self._cost()
        self._stop()
        published = re.findall(r"(\d+) reports published", (self._said() or [""])[-1])
        return int(published[-1]) if published else 0

    def _start(self, port: int) -> "subprocess.Popen[bytes]":
        folder, there = self._folder, self._there
        key = folder / "device.key"
        key.touch(mode=0o600)
        key.write_text(self._secret.hex() + "\n")
        config = folder / "stonechat.toml"
        config.write_text(
            f"""[device]
id = "{NAME}"
fleet = "demo"
key_file = "{key}"
state_file = "{folder}/state/state"
[model]
file = "{self._model}"
[collector]
interfaces = ["{netns.INTERFACE}"]
disks = {json.dumps([there.disk] if there.disk else [])}
cgroup = "{there.cgroup}"
bpf = {"true" if there.schema == "linux-1" else "false"}
[mqtt]
host = "127.0.0.1"
port = {port}
tls = false   # it never leaves this machine; a device in the field leaves this line out
[report]
heartbeat_windows = 1
bytes_per_day = 100000000
outbox_dir = "{folder}/outbox"
"""
        )
        command = [*there.watching, sys.executable, "-m", "stonechat.linux.cli", "--config", str(config)]
        with open(folder / "agent.log", "wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def _why_dead(self) -> str | None:
        if self._agent and self._agent.poll() is None:
            return None
        return f"the agent ended; its last words: {(self._said() or ['none'])[-1]}"

    def _said(self) -> list[str]:
        return (self._folder / "agent.log").read_text(errors="replace").strip().splitlines()

    def _cost(self) -> None:
        """What the agent took since its start: percent of one core, bytes resident."""
        if not self._agent:
            return
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{self._agent.pid}/stat").read_text().rsplit(")", 1)[1].split()
            cpu_s = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
            pages = int(Path(f"/proc/{self._agent.pid}/statm").read_text().split()[1])
            self.cpu_percent = 100 * cpu_s / (time.monotonic() - self._started_s)
            self.rss_bytes = pages * os.sysconf("SC_PAGE_SIZE")

    def _stop(self) -> None:
        agent = self._agent
        if agent and agent.poll() is None:
            agent.send_signal(signal.SIGTERM)
            try:
                agent.wait(30)
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()


_LISTEN = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(fileno=int(sys.argv[1])) as parent:
    socket.send_fds(parent, [b"%d" % listener.getsockname()[1]], [listener.fileno()])
"""


@contextlib.contextmanager
def relay(prefix: tuple[str, ...], port: int) -> Iterator[int]:
    """A port on the loopback of the namespace that `prefix` enters, which leads to 127.0.0.1:port of this one: the
    device's link to its broker, which none of its interfaces counts. Raises ConfigError."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [*prefix, sys.executable, "-c", _LISTEN, str(theirs.fileno())]
        done = subprocess.run(command, pass_fds=[theirs.fileno()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"no socket in the device's network: {done.stderr.strip()[-200:]}")
        text, files, _, _ = socket.recv_fds(ours, 16, 1)
    with socket.socket(fileno=files[0]) as listener:
        threading.Thread(target=_accept, args=(listener, port), daemon=True).start()
        try:
            yield int(text)
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, port: int) -> None:
    with contextlib.suppress(OSError):
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", port))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
