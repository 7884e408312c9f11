"""Private namespaces for the fleet: nothing that it does is seen outside, and all of it ends with the process.

The command runs itself again as process 1 of new network, mount and process namespaces: network traffic stays on a
loopback interface of its own, mounts vanish with it, and no process outlives it. Needs root.
"""

import contextlib
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

INSIDE = "STONECHAT_WORLD_INSIDE"
BROKER_NAME = "broker.test"
RESOLVER = "127.0.0.53"
DEAD = [f"127.99.0.{i}" for i in range(1, 9)]  # packets to them are dropped
MUTE = "127.98.0.1"  # takes connections and never answers


def enter(arguments: list[str]) -> int:
    """Run this command again inside new namespaces -> its exit status."""
    command = ["unshare", "--net", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    command += ["--mount-proc", sys.executable, "-m", "stonechat_tools.proofs.world", *arguments]
    return subprocess.run(command, env={**os.environ, INSIDE: "1"}, check=False).returncode


def is_inside() -> bool:
    return os.environ.get(INSIDE) == "1"


def prepare(folder: Path) -> None:
    """Bring loopback up, make the interpreter and this package readable for ordinary users, point the resolver here."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=20)
    for path in {Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parents[0], *map(Path, sys.path)}:
        if path.is_dir():
            expose(path.resolve())
    resolv, names = folder / "resolv.conf", folder / "nsswitch.conf"
    resolv.write_text(f"nameserver {RESOLVER}\noptions timeout:2 attempts:2\n")
    names.write_text("hosts: files dns\n")
    for source, target in ((resolv, "/etc/resolv.conf"), (names, "/etc/nsswitch.conf")):
        source.chmod(0o644)
        if os.path.exists(target):
            mount("--bind", str(source), os.path.realpath(target))


def drop_packets() -> None:
    """Packets to DEAD vanish: a connection to one of them waits for its time-out."""
    rules = "add table inet world\nadd chain inet world out { type filter hook output priority 0; }\n"
    rules += "add rule inet world out ip daddr 127.99.0.0/16 drop\n"
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True, timeout=20, capture_output=True)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, timeout=20, capture_output=True)


def expose(path: Path) -> None:
    """Let every user reach `path` in this mount namespace: a folder above it that only root may enter is replaced by
    an empty one in which `path` alone is found."""
    for closed in reversed(path.parents):
        if not stat.S_IMODE(closed.stat().st_mode) & 0o001:
            kept = Path("/run") / f"stonechat-world-{os.getpid()}-{abs(hash(closed)) % 10**6}"
            kept.mkdir(mode=0o700)
            mount("--bind", str(closed), str(kept))
            mount("-t", "tmpfs", "-o", "mode=0755,size=1m", "tmpfs", str(closed))
            for entry in kept.iterdir():  # what lies in it stays where it was; its own modes hold
                target = closed / entry.name
                if entry.is_symlink():
                    target.symlink_to(os.readlink(entry))
                    continue
                target.mkdir() if entry.is_dir() else target.touch()
                mount("--bind", str(entry), str(target))


class NameServer(threading.Thread):
    """Answers every query for an address of BROKER_NAME with `addresses`; `silent`: says nothing (packets vanish).
    RFC 1035, the little that a stub resolver asks."""

    def __init__(self, addresses: list[str]) -> None:
        super().__init__(name="name server", daemon=True)
        self.addresses = addresses
        self.silent = False
        self.asked = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((RESOLVER, 53))

    def run(self) -> None:
        while True:
            query, peer = self._socket.recvfrom(512)
            self.asked += 1
            if not self.silent:
                with contextlib.suppress(OSError, IndexError, struct.error):
                    self._socket.sendto(self._answer(query), peer)

    def _answer(self, query: bytes) -> bytes:
        at = 12
        labels = []
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]])
            at += 1 + query[at]
        question = query[12 : at + 5]
        (kind,) = struct.unpack_from(">H", query, at + 1)
        known = b".".join(labels).decode(errors="replace") == BROKER_NAME
        records = b""
        if known and kind == 1:
            for address in self.addresses:
                records += struct.pack(">HHHIH", 0xC00C, 1, 1, 1, 4) + socket.inet_aton(address)
        count = len(records) // 16
        return query[:2] + struct.pack(">HHHHH", 0x8180 if known else 0x8183, 1, count, 0, 0) + question + records


class IdleControl(threading.Thread):
    """Sleeps for 50 ms again and again and notes when the machine itself stalled: (monotonic end, seconds)."""

    def __init__(self) -> None:
        super().__init__(name="idle control", daemon=True)
        self.stalls: list[tuple[float, float]] = []

    def run(self) -> None:
        last_s = time.monotonic()
        while True:
            time.sleep(0.05)
            now_s = time.monotonic()
            if now_s - last_s > 0.5:
                self.stalls.append((now_s, now_s - last_s))
            last_s = now_s
