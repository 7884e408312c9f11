"""The processes of the fleet: each can be started, killed, stopped and continued, and is watched by a supervisor."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from stonechat_tools.proofs.world.sandbox import BROKER_NAME, mount

COLLECTOR_UID = 60_001  # an ordinary user without an account


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
