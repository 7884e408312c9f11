"""The devices of the fleet: agents on Linux, agents on MicroPython, and what they do all day."""

import contextlib
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import stonechat

from stonechat_tools.proofs.world.parts import Part, Site, faketime, tool
from stonechat_tools.proofs.world.sandbox import BROKER_NAME, mount

JOBS_PER_S = 10
ALARM_FACTOR = 1000
_DISK_KIB = 4096


def agent_user() -> int:
    """The user that the Linux agent becomes when it is started as root."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("stonechat").pw_uid
    return pwd.getpwnam("nobody").pw_uid


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
