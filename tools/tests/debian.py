"""A Debian that is booted by its own systemd, for the tests of the installation: debootstrap once, systemd-nspawn."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from once import once

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "firmware_tests"))
from targets import apt_source  # noqa: E402

STORE = ROOT / ".targets" / "debian"
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv"
BOOT_S = 120.0
# what changes by itself while a machine runs
LIVELY = ("/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp", "/var/log", "/var/cache", "/var/lib/systemd", "/root")
BACKUPS = {f"/etc/{name}-" for name in ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")}


def why_not() -> str:
    """Why no Debian can be booted here; empty where it can."""
    if os.geteuid() != 0:
        return "needs root: a booted Debian"
    missing = [name for name in ("debootstrap", "systemd-nspawn", "nsenter") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not installed (make setup-system, as root)" if missing else ""


def root_folder(suite: str) -> Path:
    """The untouched root of a release, made once. Skips where it can't be downloaded."""
    return once(STORE / suite, partial(_debootstrap, suite), PACKAGES)


def _debootstrap(suite: str, folder: Path) -> None:
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(folder)]
    command.append(apt_source(suite).split()[1])  # the mirror that this machine's own apt uses
    for _ in range(3):  # a mirror may be out of reach for a moment
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode == 0:
            return
    log = folder / "debootstrap/debootstrap.log"
    print(log.read_text(errors="replace")[-2000:] if log.exists() else made.stderr)
    pytest.skip("debootstrap could not make a Debian: " + made.stdout.strip().splitlines()[-1])


class Debian:
    """One machine: start() boots it and returns when multi-user.target is reached; its network is this machine's."""

    def __init__(self, suite: str, folder: Path) -> None:
        self.root = folder / suite
        subprocess.run(["cp", "-a", "--reflink=auto", root_folder(suite), self.root], check=True)
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost\n")  # as Debian's installer does
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._log = folder / "console.log"
        self._boots = 0

    def start(self) -> "Debian":
        # All capabilities, as the first process of a real device has them; the container keeps its own processes.
        command = ["systemd-nspawn", "--quiet", f"--directory={self.root}", "--boot", "--register=no", "--keep-unit"]
        command += ["--capability=all", "--system-call-filter=bpf", "--resolv-conf=off", "--timezone=off"]
        command += ["--link-journal=no", "--console=pipe", "systemd.unit=multi-user.target"]
        with open(self._log, "ab") as log:
            self._nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.wait_until(self.is_up, "it does not boot")
        return self

    def leader(self) -> int:
        """Process id of the machine's process 1, 0 where there is none."""
        assert self._nspawn is not None
        try:
            children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        except FileNotFoundError:
            return 0
        for child in children:
            try:
                words = Path(f"/proc/{child}/status").read_text().split("NSpid:")[1].split("\n")[0].split()
            except (FileNotFoundError, IndexError):
                continue
            if words[-1] == "1":
                return int(child)
        return 0

    def run(self, *command: object, timeout_s: float = 180) -> "subprocess.CompletedProcess[str]":
        leader = self.leader()
        enter = ["nsenter", f"--target={leader}", "--all", "--wdns=/", "env", "-i"]
        enter += ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "HOME=/root", "LANG=C.UTF-8"]
        words = [str(word) for word in command]
        return subprocess.run([*enter, *words], capture_output=True, text=True, timeout=timeout_s)

    def done(self, *command: object, timeout_s: float = 180) -> str:
        result = self.run(*command, timeout_s=timeout_s)
        assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result.stdout

    def is_up(self) -> bool:
        return bool(self.leader()) and self.run("systemctl", "is-active", "multi-user.target").stdout == "active\n"

    def reboot(self) -> None:
        """systemctl reboot: systemd-nspawn ends with status 133, for its caller to start it again."""
        assert self._nspawn is not None
        self.run("systemctl", "reboot")
        assert self._nspawn.wait(BOOT_S) == 133
        self.start()

    def wait_until(self, condition: Callable[[], object], otherwise: str, seconds: float = BOOT_S) -> None:
        until_s = time.monotonic() + seconds
        while not condition():
            assert self._nspawn is not None
            if time.monotonic() > until_s or self._nspawn.poll() is not None:
                journal = self.run("journalctl", "-n", "30", "-o", "cat", "--no-pager").stdout if self.leader() else ""
                raise AssertionError(f"{otherwise}\n{self._log.read_text(errors='replace')[-2000:]}\n{journal}")
            time.sleep(0.2)

    def stop(self) -> None:
        if self._nspawn and self._nspawn.poll() is None:
            self._nspawn.send_signal(signal.SIGTERM)  # powers it off
            try:
                self._nspawn.wait(30)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait(10)

    def files(self) -> dict[str, tuple[object, ...]]:
        """Every file, folder and link that does not change by itself -> type and mode, owner, content."""
        found: dict[str, tuple[object, ...]] = {}
        for folder, folders, names in os.walk(self.root):
            inside = "/" + os.path.relpath(folder, self.root).removeprefix(".")
            folders[:] = [name for name in folders if os.path.join(inside, name) not in LIVELY]
            for name in [*folders, *names]:
                path, where = os.path.join(folder, name), os.path.join(inside, name)
                if where in BACKUPS or where.endswith(".pyc") or name == "__pycache__":
                    continue
                facts = os.lstat(path)
                content: object = ""
                if os.path.islink(path):
                    content = os.readlink(path)
                elif os.path.isfile(path):
                    content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
                found[where] = (oct(facts.st_mode), facts.st_uid, facts.st_gid, content)
        return found
