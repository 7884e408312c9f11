"""The processes of the fleet: each can be started, killed, stopped and continued, and is watched by a supervisor."""

import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stonechat
from stonechat.errors import ConfigError

from stonechat_tools.proofs.world.sandbox import BROKER_NAME, mount

COLLECTOR_UID = 60_001  # an ordinary user without an account
JOBS_PER_S = 10
ALARM_FACTOR = 1000
_DISK_KIB = 4096


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def agent_user() -> int:
    """The user that the Linux agent becomes when it is started as root."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("stonechat").pw_uid
    return pwd.getpwnam("nobody").pw_uid


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def stonechat_tool(*words: str) -> str:
    """Run one `stonechat` verb to its end -> what it printed. Raises ConfigError with its message."""
    done = subprocess.run([tool("stonechat"), *words], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise ConfigError(f"stonechat {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def faketime() -> Path | None:
    """libfaketime for programs with threads, where it is installed."""
    return next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


class Part:
    """One process. `wanted`: the supervisor starts it again when it ends. `faults`: how many hold it now."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.log = folder / f"{name}.log"
        self.wanted = False
        self.environment: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.ended: list[tuple[float, int]] = []  # ends that no fault caused: (monotonic, exit status)
        self._restart_at_s = 0.0

    def command(self) -> list[str]:
        raise NotImplementedError

    def uid(self) -> int | None:
        return None

    def start(self) -> None:
        self.wanted = True
        self.starts += 1
        options: dict[str, Any] = {}
        uid = self.uid()
        if uid is not None:
            options = {"user": uid, "group": uid, "extra_groups": []}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd="/",
                env={**os.environ, **self.environment},
                **options,
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, number: int) -> None:
        if self.process is not None and self.running:
            self.process.send_signal(number)

    def kill(self) -> None:
        """As by kill -9, and keep it down."""
        self.wanted = False
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)

    def stop(self) -> int | None:
        """SIGTERM, and SIGKILL after 15 s -> the exit status."""
        self.wanted = False
        if self.process is None:
            return None
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(20)

    def supervise(self) -> None:
        """Start it again a second after it ended, as systemd does."""
        if not self.wanted or self.running:
            return
        now_s = time.monotonic()
        if not self._restart_at_s:
            assert self.process is not None
            self.ended.append((now_s, self.process.returncode))
            self._restart_at_s = now_s + 1.0
        elif now_s >= self._restart_at_s:
            self._restart_at_s = 0.0
            self.start()

    def rss_kib(self) -> int:
        if not self.running or self.process is None:
            return 0
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
                if line.startswith("VmRSS"):
                    return int(line.split()[1])
        return 0


class Broker(Part):
    """mosquitto under its own account, from the configuration that `stonechat broker-config` wrote."""

    def __init__(self, site: "Site") -> None:
        super().__init__(f"broker-{site.auth}", site.folder)
        self.site = site

    def command(self) -> list[str]:
        binary = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        return [binary, "-c", str(self.site.fleet / "broker" / "mosquitto.conf")]


class Collector(Part):
    """`stonechat collect` as an ordinary user, with copies of the keys that provision made, its database on a disk of
    its own."""

    def __init__(self, site: "Site") -> None:
        super().__init__(f"collector-{site.auth}", site.folder)
        self.site = site
        self.home = site.folder / "collector"
        self.disk = site.folder / "database"
        self.database = self.disk / "stonechat.db"
        self.disk.mkdir()
        mount(
            "-t", "tmpfs", "-o", f"size=128m,mode=0700,uid={COLLECTOR_UID},gid={COLLECTOR_UID}", "tmpfs", str(self.disk)
        )

    def uid(self) -> int:
        return COLLECTOR_UID

    def take_keys(self) -> None:
        """Copy what belongs on the collector's machine from the fleet's folder, as its documentation says."""
        self.home.mkdir(mode=0o700, exist_ok=True)
        for name in ("keys", "collector"):
            target = self.home / name
            fresh = self.home / (name + ".new")
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.copytree(self.site.fleet / name, fresh)
            for path in (fresh, *fresh.rglob("*")):
                os.chown(path, COLLECTOR_UID, COLLECTOR_UID)
            if target.exists():  # file by file: the collector watches this folder
                for path in fresh.iterdir():
                    os.replace(path, target / path.name)
                for path in target.iterdir():
                    if not (self.site.fleet / name / path.name).exists():
                        path.unlink()
                fresh.rmdir()
            else:
                os.replace(fresh, target)
        os.chown(self.home, COLLECTOR_UID, COLLECTOR_UID)

    def command(self) -> list[str]:
        site = self.site
        command = [
            tool("stonechat"),
            "collect",
            "--broker",
            f"{BROKER_NAME}:{site.port}",
            "--keys",
            str(self.home / "keys"),
        ]
        command += ["--db", str(self.database), "--prefix", f"stonechat/1/{site.name}/"]
        account = self.home / "collector"
        if site.auth == "plain":
            return [*command, "--plain"]
        command += ["--cafile", str(account / "ca.crt")]
        if site.auth == "mtls":
            return [*command, "--cert", str(account / "client.crt"), "--key", str(account / "client.key")]
        return [*command, "--user", "collector", "--password-file", str(account / "password")]


@dataclass
class Site:
    """One fleet: its folder as provision made it, its broker and its collector."""

    auth: str
    folder: Path
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.name = f"site-{self.auth}"
        self.folder.mkdir(mode=0o755)
        self.fleet = self.folder / "fleet"
        base = ["provision", "--dir", str(self.fleet)]
        stonechat_tool(
            *base, "init", "--broker", f"{BROKER_NAME}:{self.port}", "--auth", self.auth, "--fleet", self.name,
            "--install-dir", "/INSTALLED",
        )  # fmt: skip
        self.broker = Broker(self)
        self.collector = Collector(self)

    def provision(self, act: str, *devices: str) -> None:
        stonechat_tool("provision", "--dir", str(self.fleet), act, *devices)

    def write_broker(self) -> None:
        names = ["--name", BROKER_NAME, "--name", "localhost"]
        stonechat_tool("broker-config", "--dir", str(self.fleet), "--listen", "127.0.0.1", *names)
        self.fleet.chmod(0o711)  # mosquitto's account reads its own folder in it

    def renew(self) -> None:
        """After a change by provision: the broker reads its lists again, the collector gets the new keys."""
        self.collector.take_keys()
        self.broker.send(signal.SIGHUP)


class Device(Part):
    """What the agents on Linux and on boards share: a small disk of its own and a counter that can be made strange."""

    window_s = 1.0
    can_alarm = True

    def __init__(self, name: str, site: Site) -> None:
        folder = site.folder / name
        folder.mkdir(mode=0o755)
        super().__init__(name, folder)
        self.site = site
        self.disk = folder / "disk"
        self.disk.mkdir()
        uid = agent_user()
        mount("-t", "tmpfs", "-o", f"size={_DISK_KIB}k,mode=0700,uid={uid}", "tmpfs", str(self.disk))
        self.jobs_file = folder / "jobs"
        self.jobs_file.write_text("0\n")
        self.jobs = 0.0
        self.strange = False
        self.clock_offset_s = 0

    def install(self) -> None:
        """Take what provision made for this device: key, certificate, configuration."""
        raise NotImplementedError

    def do_jobs(self, elapsed_s: float) -> None:
        self.jobs += elapsed_s * JOBS_PER_S * (ALARM_FACTOR if self.strange else 1)
        fresh = self.jobs_file.with_suffix(".new")
        fresh.write_text(f"{int(self.jobs)}\n")
        os.replace(fresh, self.jobs_file)

    def wipe(self) -> None:
        """As a board that is flashed anew: nothing on its disk is left."""
        for path in self.disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def image(self, to: Path) -> None:
        shutil.rmtree(to, ignore_errors=True)
        _copy_owned(self.disk, to)

    def restore(self, image: Path) -> None:
        self.wipe()
        for path in image.iterdir():
            _copy_owned(path, self.disk / path.name)


def _copy_owned(source: Path, to: Path) -> None:
    subprocess.run(["cp", "-a", str(source), str(to)], check=True, timeout=60)


class LinuxAgent(Device):
    """`stonechat-agent`, started as root. variant: transport ("lean" or "paho") and whether BPF counts."""

    def __init__(
        self, name: str, site: Site, models: Path, transport: str, bpf: bool = False, cgroup: str = ""
    ) -> None:
        super().__init__(name, site)
        self.transport = transport
        self.bpf = bpf
        self.cgroup = cgroup
        self.models = models

    def install(self) -> None:
        source = self.site.fleet / "devices" / self.name
        uid = agent_user()
        for path in source.iterdir():
            if path.name == "stonechat.toml":
                continue
            fresh = self.folder / (path.name + ".new")
            shutil.copyfile(path, fresh)
            fresh.chmod(0o600)
            os.chown(fresh, uid, -1)
            os.replace(fresh, self.folder / path.name)
        config = tomllib.loads((source / "stonechat.toml").read_text().replace("/INSTALLED", str(self.folder)))
        config["device"]["state_file"] = str(self.disk / "state" / "state")
        config["model"]["file"] = str(self.models / ("linux-1.tflite" if self.bpf else "linux-proc-1.tflite"))
        config["collector"] = {"bpf": self.bpf, "cgroup": self.cgroup}
        config["mqtt"] |= {"transport": self.transport, "keepalive_s": 10}
        config["report"] = {
            "heartbeat_windows": 1,
            "bytes_per_day": 1_000_000_000,
            "outbox_dir": str(self.disk / "outbox"),
            "outbox_bytes": 262_144,
            "resend_s": 3,
        }
        row = {"name": "jobs", "unit": "jobs/s", "kind": "rate", "path": str(self.jobs_file)}
        config["counters"] = {"list": [row], "schema": "jobs-1", "model": str(self.models / "jobs.tflite")}
        (self.folder / "stonechat.toml").write_text(_toml(config))

    def command(self) -> list[str]:
        return [tool("stonechat-agent"), "--config", str(self.folder / "stonechat.toml")]

    def start(self) -> None:
        self.environment = {}
        if self.clock_offset_s:  # not by the command `faketime`: it forks, and signals would reach the wrong process
            self.environment = {"LD_PRELOAD": str(faketime()), "FAKETIME": f"{self.clock_offset_s:+d}s"}
        super().start()


class Board(Device):
    """MicroPython with the board's agent. client: "own", or "simple" for one that the firmware brings."""

    def __init__(
        self,
        name: str,
        site: Site,
        models: Path,
        interpreter: tuple[str, ...],
        profile: str,
        client: str,
        echo_port: int,
    ) -> None:
        super().__init__(name, site)
        self.models = models
        self.interpreter = interpreter
        self.profile = profile
        self.client = client
        self.echo_port = echo_port
        self.can_alarm = profile == "full"
        agent = Path(stonechat.__file__).parent.parent
        self.environment = {"MICROPYPATH": f"{agent}:.frozen"}

    def uid(self) -> int:
        return agent_user()

    def install(self) -> None:
        source = self.site.fleet / "devices" / self.name
        values: dict[str, Any] = {
            "device": self.name,
            "fleet": self.site.name,
            "key": (source / "device.key").read_text().split()[0],
            "profile": self.profile,
            "client": self.client,
            "model": str(self.models / "micropython-1.tflite"),
            "jobs_model": str(self.models / "jobs.tflite") if self.profile == "full" else "",
            "jobs": str(self.jobs_file),
            "folder": str(self.disk / "data"),
            "host": BROKER_NAME,
            "port": self.site.port,
            "echo_port": self.echo_port,
        }
        if self.site.auth == "passwords":
            der = self.folder / "ca.der"
            command = ["openssl", "x509", "-in", str(source / "ca.crt"), "-outform", "DER", "-out", str(der)]
            subprocess.run(command, check=True, timeout=20)
            der.chmod(0o644)
            values |= {"ca": str(der), "user": self.name, "password": (source / "password").read_text().strip()}
        path = self.folder / "config.json"
        path.write_text(json.dumps(values))
        path.chmod(0o600)
        os.chown(path, agent_user(), -1)

    def command(self) -> list[str]:
        script = Path(__file__).with_name("board_device.py")
        return [*self.interpreter, "-X", "heapsize=2m", str(script), str(self.folder / "config.json")]


class Jobs(threading.Thread):
    """Moves every device's own counter on, ten times a second."""

    def __init__(self, devices: list[Device]) -> None:
        super().__init__(name="jobs", daemon=True)
        self.devices = devices

    def run(self) -> None:
        last_s = time.monotonic()
        while True:
            time.sleep(0.1)
            now_s = time.monotonic()
            for device in list(self.devices):
                with contextlib.suppress(OSError):
                    device.do_jobs(now_s - last_s)
            last_s = now_s


class Echo(threading.Thread):
    """Takes the boards' datagrams."""

    def __init__(self) -> None:
        super().__init__(name="echo", daemon=True)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])

    def run(self) -> None:
        while True:
            self._socket.recvfrom(64)


def _toml(config: dict[str, dict[str, Any]]) -> str:
    lines = []
    for section, values in config.items():
        lines += [f"[{section}]"] + [f"{name} = {_value(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_value(item)}" for name, item in value.items()) + "}"
    return json.dumps(value)


def make_models(folder: Path, window_ms: int) -> None:
    """Quick models with short windows that take ordinary windows for normal; only `jobs` is meant to alarm."""
    import numpy as np
    from stonechat.board.schema import MICROPYTHON_1
    from stonechat.custom_counters import counter_schema
    from stonechat.features import RATE, SHARE
    from stonechat.linux.schemas import LINUX_1, LINUX_PROC_1

    from stonechat_tools.modeling.fit import fit

    folder.mkdir(mode=0o755)
    rng = np.random.default_rng(0)
    for schema in (LINUX_1, LINUX_PROC_1, MICROPYTHON_1):
        middle = np.array([12800 if kind == SHARE else 1500 if kind == RATE else 500 for _, _, kind in schema.columns])
        rows = np.rint(middle + rng.normal(size=(400, len(schema))) * 4000).clip(0, 25600)
        fitted = fit(rows, schema, window_ms)
        fitted.meta.alarm_rules = ((1024, 1536, 60 * 256),)  # these channels carry windows, they never alarm
        (folder / f"{schema.name}.tflite").write_bytes(fitted.to_tflite(schema.name, 1))
    schema = counter_schema("jobs-1", (("jobs", "jobs/s", RATE),))
    rows = np.rint(886 + rng.normal(size=(400, 1)) * 128).clip(0, 5000)  # log2(1 + 10 a second), half an octave
    fitted = fit(rows, schema, window_ms)
    fitted.meta.alarm_rules = ((512, 1024, 1024),)
    (folder / "jobs.tflite").write_bytes(fitted.to_tflite("jobs", 1))
    for path in folder.iterdir():
        path.chmod(0o644)


def token() -> str:
    return secrets.token_hex(4)
