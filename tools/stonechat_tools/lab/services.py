"""A busy host: eight services, each a process in a cgroup of its own, and the clients of those that serve.

Four are devices of benign.py (camera, gateway, sensor, plug); web answers requests, store keeps a journal and compacts
it, login lets somebody in now and then, cron runs small scripts. Needs root; everything ends with the context manager.

Examples:
  python -m stonechat_tools.lab.services --kind store --seconds 60       one service by itself
"""

import argparse
import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stonechat_tools.lab import benign, box, netns
from stonechat_tools.lab.bounds import Deadline, leave_cleanly_on_signals, scratch_folder, started, stopped

MODULE = "stonechat_tools.lab.services"
DEVICES = ("camera", "gateway", "sensor", "plug")
PORTS = {"web": 21081, "login": 21023}
TIMEOUT_S = 3.0
_PAGES = 20
_JOURNAL_BYTES = 400_000
_SESSION = "id; uname -r; ls /etc | head; uptime"
_JOIN = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True)
class Host:
    """names: of the services; `cgroups`: their folders; `inside`: command prefixes that put a process into one of
    them; `watching`: the prefix of who watches; `net`: both ends of its network; `folder`: where they write."""

    net: netns.Pair
    cgroups: dict[str, str]
    inside: dict[str, tuple[str, ...]]
    watching: tuple[str, ...]
    folder: str

    @property
    def names(self) -> list[str]:
        return list(self.cgroups)


@contextlib.contextmanager
def host(seconds: float, pace: float = 1.0, seed: int = 7) -> Iterator[Host]:
    """Eight services at work for `seconds` at the most. pace: how much more often the rare things happen. Raises
    ConfigError or OSError where this machine or user can't make one."""
    box.need_root()
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(netns.pair(seconds))
        _, folder = stack.enter_context(box.disk())
        parent = stack.enter_context(box.cgroup())
        cgroups, inside = {}, {}
        for kind in NAMES:
            group = parent / f"{kind}.service"
            group.mkdir()
            stack.callback(box.remove, group)
            cgroups[kind] = str(group)
            join = ("sh", "-c", _JOIN, str(group / "cgroup.procs"))
            inside[kind] = (*net.device, "env", f"TMPDIR={folder}", *join)
        for number, kind in enumerate(cgroups):
            words = command(kind, seconds, pace=pace, seed=seed * 100 + number, peers=(net.peers, net.router))
            stack.callback(stopped, started([*inside[kind], *words]))
        words = [sys.executable, "-m", MODULE, "--kind", "clients", "--target", net.address]
        words += ["--seconds", str(seconds), "--pace", str(pace), "--seed", str(seed)]
        stack.callback(stopped, started([*net.outside, *words]))
        yield Host(net, cgroups, inside, net.device, folder)


def command(kind: str, seconds: float, *, pace: float, seed: int, peers: tuple[str, str] | None = None) -> list[str]:
    """What starts a service as a process of its own; it prints a line once it is up."""
    if kind in DEVICES:
        return benign.command(kind, seconds, *(peers or (None, None)), pace=pace, seed=seed)
    words = [sys.executable, "-m", MODULE, "--kind", kind, "--seconds", str(seconds)]
    return [*words, "--pace", str(pace), "--seed", str(seed)]


@dataclass
class Scene:
    deadline: Deadline
    folder: Path
    rng: random.Random
    pace: float

    def every(self, least_s: float, greatest_s: float) -> float:
        return self.rng.uniform(least_s, greatest_s)

    def rarely(self, least_s: float, greatest_s: float) -> float:
        return self.rng.uniform(least_s, greatest_s) / self.pace


def _listen(port: int) -> socket.socket:
    sock = socket.create_server(("0.0.0.0", port), backlog=64)
    sock.settimeout(1.0)
    print("up", flush=True)
    return sock


def _web(scene: Scene) -> None:
    """Pages from files, one request a connection, each a line in the log."""
    for n in range(_PAGES):
        (scene.folder / f"page{n}").write_bytes(scene.rng.randbytes(1000 + 400 * n))
    with _listen(PORTS["web"]) as server:
        while scene.deadline.live():
            with contextlib.suppress(OSError):
                sock, sender = server.accept()
                with sock:
                    sock.settimeout(TIMEOUT_S)
                    page = int(sock.recv(512).split()[1][1:]) % _PAGES
                    sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + (scene.folder / f"page{page}").read_bytes())
                    with (scene.folder / "access.log").open("a") as log:
                        log.write(f"{time.time():.3f} {sender[0]} {page}\n")


def _store(scene: Scene) -> None:
    """A journal, synced once a second, that is compacted when it has grown."""
    print("up", flush=True)
    journal = scene.folder / "journal"
    while scene.deadline.live():
        with journal.open("ab") as file:
            for _ in range(scene.rng.randrange(2, 8)):
                file.write(scene.rng.randbytes(scene.rng.randrange(200, 900)))
                file.flush()
            os.fsync(file.fileno())
        if journal.stat().st_size > _JOURNAL_BYTES / scene.pace:
            kept = journal.read_bytes()[-_JOURNAL_BYTES // 8 :]
            compacted = scene.folder / "journal.new"
            with compacted.open("wb") as file:
                file.write(kept)
                os.fsync(file.fileno())
            compacted.rename(journal)
        scene.deadline.sleep(scene.every(0.3, 1.2))


def _login(scene: Scene) -> None:
    """Lets somebody in who asks, sometimes for a short session of a shell."""
    with _listen(PORTS["login"]) as server:
        while scene.deadline.live():
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                sock, _ = server.accept()
                with sock:
                    sock.settimeout(TIMEOUT_S)
                    sock.recv(64)
                    if scene.rng.random() < 0.5:
                        done = subprocess.run(
                            ["sh", "-c", _SESSION], capture_output=True, timeout=TIMEOUT_S, check=False
                        )
                        sock.sendall(done.stdout[:1000])
                    sock.sendall(b"bye\n")


def _cron(scene: Scene) -> None:
    print("up", flush=True)
    while scene.deadline.live():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            words = ["sh", "-c", benign.CRON_SCRIPT]
            subprocess.run(words, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False)
        scene.deadline.sleep(scene.rarely(15, 60))


KINDS: dict[str, Callable[[Scene], None]] = {"web": _web, "store": _store, "login": _login, "cron": _cron}


NAMES = (*KINDS, *DEVICES)


def _clients(scene: Scene, target: str) -> None:
    """Whoever asks web and login: a few requests a second, more in bursts."""
    print("up", flush=True)
    burst_s = login_s = 0.0
    while scene.deadline.live():
        now_s = time.monotonic()
        if now_s >= login_s:
            login_s = now_s + scene.rarely(20, 90)
            _ask(target, PORTS["login"], b"operator\n")
        if now_s >= burst_s and scene.rng.random() < 0.01:
            burst_s = now_s + scene.every(2, 10)
        _ask(target, PORTS["web"], b"GET /%d HTTP/1.0\r\n\r\n" % scene.rng.randrange(_PAGES))
        scene.deadline.sleep(scene.rng.expovariate(20 if now_s < burst_s else 4))


def _ask(target: str, port: int, text: bytes) -> None:
    with contextlib.suppress(OSError), socket.create_connection((target, port), TIMEOUT_S) as sock:
        sock.sendall(text)
        while sock.recv(65536):
            pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=(*KINDS, "clients"), required=True, help="which service")
    parser.add_argument("--target", default="127.0.0.1", metavar="HOST", help="whom the clients ask")
    parser.add_argument("--seconds", type=float, default=300.0, help="how long (default 300)")
    parser.add_argument("--pace", type=float, default=1.0, help="how much more often the rare things happen")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    leave_cleanly_on_signals()
    with scratch_folder() as folder:
        scene = Scene(Deadline(args.seconds), folder, random.Random(args.seed), args.pace)
        if args.kind == "clients":
            _clients(scene, args.target)
        else:
            KINDS[args.kind](scene)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
