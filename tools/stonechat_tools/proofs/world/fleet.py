"""The fleet: its sites, its devices, and what is known of the faults that were caused."""

import contextlib
import os
import random
import socket
import sqlite3
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path

import cbor2
from stonechat.errors import ConfigError, StonechatError

from stonechat_tools.proofs.interpreters import interpreters
from stonechat_tools.proofs.world import sandbox
from stonechat_tools.proofs.world.devices import Board, Device, Echo, Jobs, LinuxAgent, make_models
from stonechat_tools.proofs.world.parts import Part, Site, faketime

WINDOW_MS = 2000
STARTS_WITHIN_S = 25.0  # an agent's first scored window after its process begins, on a busy machine
SETTLE_WINDOWS = 12  # of a collector that learns its peers


class Service:
    """The process whose cgroup one agent watches."""

    def __init__(self) -> None:
        from stonechat.linux.cgroup_id import cgroup_root

        self.folder = Path(cgroup_root()) / f"stonechat-world-{os.getpid()}-{time.monotonic_ns()}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        script = 'echo $$ > "$0/cgroup.procs"; while sleep 0.2; do ls / > /dev/null; done'
        self._process = subprocess.Popen(["sh", "-c", script, str(self.folder)], stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s and self.folder.exists():
            with contextlib.suppress(OSError):
                (self.folder / "cgroup.kill").write_text("1")
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            time.sleep(0.05)


class World:
    """The fleet, its faults and what is known of them. devices: those whose every window must be scored; victims: one
    a site, to be revoked."""

    window_s = WINDOW_MS / 1000

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed ^ 0x5EED)
        self.failures: list[str] = []
        self.provisioning = threading.Lock()
        self.lost: dict[str, set[tuple[bytes, int]]] = defaultdict(set)
        self.unsaved: dict[str, list[tuple[float, float]]] = {}
        self.revoked: dict[str, list[tuple[float, float]]] = {}
        self.harmed: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.unresolved: list[tuple[float, float]] = []  # when a look-up could block: boards can't avoid it
        self.cut: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._disturbed: dict[str, tuple[int, float]] = {}  # faults that hold now, when the last one ended
        self.has_faketime = faketime() is not None
        self.memory: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
        self.devices: list[Device] = []
        self.victims: list[Device] = []
        self.left_out: list[str] = []
        self.control = sandbox.IdleControl()
        self.names = sandbox.NameServer(["127.0.0.1"])
        self.echo = Echo()
        self.service = Service()
        self.sites = [Site(auth, folder / auth) for auth in ("mtls", "passwords", "plain")]
        make_models(folder / "models", WINDOW_MS)
        self._make_devices(folder / "models")
        self.jobs = Jobs([*self.devices, *self.victims])

    def _make_devices(self, models: Path) -> None:
        mtls, passwords, plain = self.sites
        found = {one.name: one for one in interpreters()}
        plan: list[tuple[Site, str, str, str]] = [
            *[(mtls, "linux", "lean", "")] * 3,
            *[(mtls, "linux", "paho", "")] * 3,
            (mtls, "linux", "lean", "bpf"),
            *[(passwords, "linux", "lean", "")] * 2,
            *[(passwords, "linux", "paho", "")] * 2,
            (passwords, "unix-x64", "own", "full"),
            (passwords, "unix-i386", "own", "full"),
            *[(plain, "linux", "lean", "")] * 2,
            *[(plain, "linux", "paho", "")] * 2,
            (plain, "linux", "lean", "cgroup"),
            (plain, "unix-x64", "own", "core"),
            (plain, "unix-i386", "own", "full"),
            (plain, "unix-armhf", "own", "core"),
            (plain, "unix-x64", "simple", "full"),
        ]
        for number, (site, runtime, client, more) in enumerate(plan):
            name = f"{runtime.removeprefix('unix-')}-{client}{'-' + more if more else ''}-{number}"
            if runtime == "linux":
                bpf = more in ("bpf", "cgroup")
                cgroup = str(self.service.folder) if more == "cgroup" else ""
                self.devices.append(LinuxAgent(name, site, models, client, bpf, cgroup))
                continue
            interpreter = found.get(runtime)
            if interpreter is None or interpreter.missing:
                self.left_out.append(f"{name}: {interpreter.missing if interpreter else 'no such interpreter'}")
                continue
            self.devices.append(Board(name, site, models, interpreter.command, more, client, self.echo.port))
        self.victims = [LinuxAgent(f"victim-{site.auth}", site, models, "lean") for site in self.sites]

    # --- what is known of faults ----------------------------------------------------------------------------------

    def fail(self, text: str) -> None:
        self.failures.append(text)

    def undisturbed_since(self, device: Device) -> float:
        """Monotonic seconds since when nothing separates the device from the table; now, where something does."""
        holds, ended_s = self._disturbed.get(device.name, (0, 0.0))
        return time.monotonic() if holds else ended_s

    def disturb(self, devices: list[Device], change: int) -> None:
        for device in devices:
            holds, _ = self._disturbed.get(device.name, (0, 0.0))
            self._disturbed[device.name] = (holds + change, time.monotonic())

    def excuses(self, device: Device) -> list[tuple[float, float]]:
        """Unix seconds between which windows of this device may be missing: its own faults, stalls of the machine."""
        offset_s = time.time() - time.monotonic()
        settle_s = SETTLE_WINDOWS * self.window_s if isinstance(device, LinuxAgent) and device.bpf else 0.0
        spans = [(b - self.window_s - 1, e + STARTS_WITHIN_S + settle_s) for b, e in self.harmed[device.name]]
        for end_s, length_s in self.control.stalls:
            spans.append((end_s - length_s - self.window_s + offset_s, end_s + self.window_s + offset_s))
        return spans

    def lose_pending(self, device: Device) -> None:
        for outbox in (device.disk / "outbox", device.disk / "data" / "outbox"):
            with contextlib.suppress(StonechatError):
                self.lost[device.name] |= pending(device, outbox, self.folder / "pending")

    def shout(self, site: Site, topic: str, payload: bytes) -> None:
        """Publish as a stranger, or as an account of the site where strangers are refused."""
        command = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(site.port), "-t", topic, "-q", "1", "-s"]
        if site.auth != "plain":
            return
        subprocess.run(command, input=payload, capture_output=True, timeout=15, check=False)

    # --- the run --------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> list[Part]:
        return [
            *[site.broker for site in self.sites],
            *[site.collector for site in self.sites],
            *self.devices,
            *self.victims,
        ]

    def start(self) -> None:
        for thread in (self.control, self.names, self.echo):
            thread.start()
        self.service.start()
        for site in self.sites:
            names = [device.name for device in [*self.devices, *self.victims] if device.site is site]
            site.provision("add", *names)
            site.write_broker()
            site.collector.take_keys()
            site.broker.start()
            site.collector.start()
            _mute_listener(site.port)
        for device in [*self.devices, *self.victims]:
            device.install()
            device.start()
        self.jobs.start()
        self._wait_for_all(180.0)

    def _wait_for_all(self, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        wanted = {device.name for device in [*self.devices, *self.victims]}
        while time.monotonic() < deadline_s:
            seen = {name for site in self.sites for name in _names(site.collector.database)}
            if wanted <= seen:
                return
            for part in self.parts:
                part.supervise()
            time.sleep(0.5)
        raise ConfigError(f"never reported: {', '.join(sorted(wanted - seen))}; {self._last_words(wanted - seen)}")

    def _last_words(self, names: set[str]) -> str:
        words = []
        for part in self.parts:
            if part.name in names and part.log.exists():
                words += [f"{part.name}: {line}" for line in part.log.read_text(errors="replace").splitlines()[-3:]]
        return " | ".join(words)

    def stop(self) -> None:
        for device in [*self.devices, *self.victims]:
            device.kill()
        for site in self.sites:
            site.collector.stop()
            site.broker.stop()
        self.service.stop()

    def check_parts(self) -> None:
        for part in self.parts:
            for _, status in part.ended:
                self.fail(f"{part.name} ended by itself with {status}")
            if part.log.exists() and b"Traceback" in part.log.read_bytes():
                self.fail(f"{part.name}: a traceback in its log")
            self._check_memory(part)

    def _check_memory(self, part: Part) -> None:
        for start in {starts for _, starts, _ in self.memory[part.name]}:
            sizes = [kib for _, starts, kib in self.memory[part.name] if starts == start and kib]
            if len(sizes) < 120:  # ten minutes
                continue
            third = len(sizes) // 3
            middle, last = sorted(sizes[third : 2 * third])[third // 2], sorted(sizes[-third:])[third // 2]
            if last - middle > max(2048, middle // 10):
                self.fail(f"{part.name}: its memory grew from {middle} to {last} KiB")


def _names(database: Path) -> set[str]:
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)) as opened,
    ):
        return {name for (name,) in opened.execute("SELECT name FROM devices WHERE id IN (SELECT device FROM reports)")}
    return set()


def _mute_listener(port: int) -> None:
    """Take connections to sandbox.MUTE on this port and never answer."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((sandbox.MUTE, port))
    server.listen(64)

    def accept() -> None:
        held = []
        while True:
            held.append(server.accept()[0])
            del held[:-64]

    threading.Thread(target=accept, daemon=True).start()


def pending(device: Device, outbox: Path, scratch: Path) -> set[tuple[bytes, int]]:
    """What waits in a stopped agent's outbox: (stream, number) of each report. A copy is read: opening one begins a
    new segment."""
    from stonechat.outbox import Outbox

    if not outbox.is_dir():
        return set()
    subprocess.run(["rm", "-rf", str(scratch)], check=True, timeout=20)
    subprocess.run(["cp", "-a", str(outbox), str(scratch)], check=True, timeout=20)
    opened = Outbox(str(scratch), 1 << 24)
    found: set[tuple[bytes, int]] = set()
    at = 0
    while True:
        record = opened.after(at)
        if record is None:
            return found
        at, body = record[0], record[1]
        found.add((bytes(cbor2.loads(bytes(body)).get(16, b"")), at))
