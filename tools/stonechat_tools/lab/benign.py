"""A device's ordinary day: sensor reads, publishing, web and name look-ups, clock, cron, log, now and then an update.

Without --target it brings its own peers on loopback; with it, `peers` serves at that address. --pace 4 makes what is
rare (cron, update, clock, motion) four times as frequent, so that a short recording has seen it all.

Examples:
  python -m stonechat_tools.lab.benign --kind sensor --seconds 300
  python -m stonechat_tools.lab.benign --kind camera --target 10.99.0.1
"""

import argparse
import contextlib
import json
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stonechat_tools.lab.bounds import Deadline, leave_cleanly_on_signals, scratch_folder, started
from stonechat_tools.lab.peers import PORTS, Peers

MODULE = "stonechat_tools.lab.benign"
TICK_S = 0.1
TIMEOUT_S = 3.0
LOG_MAX_BYTES = 256_000  # then it starts anew, as logrotate does
CRON_SCRIPT = "ls /etc | wc -l; grep Mem /proc/meminfo; df / ; date"
_SENSOR_FILES = ("/proc/uptime", "/sys/class/net/lo/mtu")


@dataclass(frozen=True)
class Kind:
    """Intervals in seconds between one thing and the next, each drawn from (least, greatest); (0, 0) is never."""

    what: str
    sensor_reads: int = 1  # a tick
    publish_s: tuple[float, float] = (0.95, 1.05)
    publish_bytes: int = 120
    page_s: tuple[float, float] = (7, 14)
    local_page_s: tuple[float, float] = (3, 5)
    name_s: tuple[float, float] = (10, 40)
    clock_s: tuple[float, float] = (30, 34)
    log_s: tuple[float, float] = (1, 3)
    cron_s: tuple[float, float] = (58, 62)
    update_s: tuple[float, float] = (90, 150)
    frame_s: tuple[float, float] = (0, 0)
    frame_bytes: int = 6_000
    motion_s: tuple[float, float] = (40, 120)  # from one motion to the next; while it lasts, frames are larger
    motion_lasts_s: float = 8.0
    node_s: tuple[float, float] = (0, 0)  # a radio node's datagram, handed on to the broker
    nodes: int = 0


KINDS = {
    "sensor": Kind("reads ten times a second, publishes once a second"),
    "camera": Kind(
        "streams five frames a second, more while something moves",
        publish_s=(4.5, 5.5),
        frame_s=(0.2, 0.2),
        update_s=(200, 300),
        log_s=(2, 6),
    ),
    "gateway": Kind(
        "hands on what twelve radio nodes say",
        publish_s=(0.45, 0.55),
        publish_bytes=400,
        local_page_s=(1, 2),
        node_s=(0.1, 0.9),
        nodes=12,
        name_s=(5, 20),
        cron_s=(28, 32),
    ),
    "plug": Kind(
        "sleeps, and says so now and then",
        sensor_reads=0,
        publish_s=(9.5, 10.5),
        publish_bytes=60,
        page_s=(50, 70),
        local_page_s=(20, 40),
        log_s=(20, 40),
        update_s=(300, 500),
    ),
    "meter": Kind(
        "does the same five times a second, and nothing else: 20 seconds of learning have seen it all",
        publish_s=(0.2, 0.2),
        page_s=(0.2, 0.2),
        local_page_s=(0, 0),
        name_s=(0.2, 0.2),
        clock_s=(0, 0),
        log_s=(0, 0),
        cron_s=(0, 0),
        update_s=(0, 0),
        motion_s=(0, 0),
    ),
}
_RARE = ("clock_s", "cron_s", "update_s", "motion_s")


class Device:
    """One device of a kind. `ports`: where its peers serve on `target`, and names and time on `router`; `own`: what it
    serves itself."""

    def __init__(
        self,
        kind: Kind,
        folder: Path,
        target: str,
        router: str,
        ports: dict[str, int],
        own: Peers,
        rng: random.Random,
        pace: float,
    ) -> None:
        self.kind = kind
        self._folder = folder
        self._target = target
        self._router = router
        self._ports = ports
        self._own = own
        self._rng = rng
        self._pace = pace
        self._now_s = 0.0
        self._motion_until_s = 0.0
        self._log_bytes = 0
        self._broker: socket.socket | None = None
        self._stream: socket.socket | None = None
        self._tasks: list[tuple[str, Callable[[], object]]] = [
            ("publish_s", self._publish),
            ("page_s", lambda: self._fetch(target, ports["http"], "/settings")),
            ("local_page_s", lambda: self._fetch(own.host, own.ports["http"], "/status")),
            ("name_s", lambda: self._ask("dns", 30)),
            ("clock_s", lambda: self._ask("ntp", 48)),
            ("log_s", self._log),
            ("cron_s", self._cron),
            ("update_s", self._update),
            ("frame_s", self._frame),
            ("motion_s", self._motion),
            ("node_s", self._node),
        ]
        self._due_s = {name: self._interval_s(name) * rng.random() for name, _ in self._tasks}

    def run(self, deadline: Deadline) -> None:
        start_s = deadline.end_s - deadline.left_s()
        ticks = 0
        while deadline.live():
            self._now_s = ticks * TICK_S
            self._read_sensors()
            for name, task in self._tasks:
                interval_s = self._interval_s(name)
                if interval_s and self._now_s >= self._due_s[name]:
                    self._due_s[name] = self._now_s + interval_s
                    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                        task()  # a real device goes on when its network does not
            ticks += 1
            behind_s = (deadline.end_s - deadline.left_s()) - start_s - ticks * TICK_S
            deadline.sleep(max(0.0, -behind_s))

    def close(self) -> None:
        for sock in (self._broker, self._stream):
            if sock:
                sock.close()

    def _interval_s(self, name: str) -> float:
        least, greatest = getattr(self.kind, name)
        return self._rng.uniform(least, greatest) / (self._pace if name in _RARE else 1)

    def _read_sensors(self) -> None:
        for _ in range(self.kind.sensor_reads):
            for path in _SENSOR_FILES:
                Path(path).read_bytes()

    def _connect(self, service: str) -> socket.socket:
        sock = socket.create_connection((self._target, self._ports[service]), TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _publish(self) -> None:
        try:
            self._broker = self._broker or self._connect("broker")
            self._broker.sendall(b"\x32" + self._rng.randbytes(self.kind.publish_bytes))
            self._broker.recv(64)
        except OSError:
            if self._broker:
                self._broker.close()
            self._broker = None
            raise

    def _fetch(self, host: str, port: int, path: str) -> int:
        n_bytes = 0
        with socket.create_connection((host, port), TIMEOUT_S) as sock:
            sock.sendall(b"GET %s HTTP/1.0\r\n\r\n" % path.encode())
            while chunk := sock.recv(65536):
                n_bytes += len(chunk)
        return n_bytes

    def _ask(self, service: str, n_bytes: int) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(TIMEOUT_S)
            sock.sendto(bytes(n_bytes), (self._router, self._ports[service]))
            sock.recv(512)

    def _log(self) -> None:
        line = f"{self._now_s:.1f} reading {self._rng.random():.6f}\n"
        fresh = self._log_bytes > LOG_MAX_BYTES
        self._log_bytes = (0 if fresh else self._log_bytes) + len(line)
        with (self._folder / "app.log").open("w" if fresh else "a") as file:
            file.write(line)

    def _cron(self) -> None:
        subprocess.run(["sh", "-c", CRON_SCRIPT], stdout=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False)

    def _update(self) -> None:
        n_bytes = self._fetch(self._target, self._ports["http"], "/firmware")
        (self._folder / "firmware.bin").write_bytes(bytes(n_bytes))

    def _motion(self) -> None:
        self._motion_until_s = self._now_s + self.kind.motion_lasts_s

    def _frame(self) -> None:
        moving = self._now_s < self._motion_until_s
        n_bytes = int(self.kind.frame_bytes * self._rng.uniform(0.8, 1.2) * (3 if moving else 1))
        try:
            self._stream = self._stream or self._connect("stream")
            self._stream.sendall(bytes(n_bytes))
        except OSError:
            if self._stream:
                self._stream.close()
            self._stream = None
            raise

    def _node(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(TIMEOUT_S)
            for _ in range(self._rng.randrange(1, 1 + self.kind.nodes // 4)):
                sock.sendto(self._rng.randbytes(24), (self._own.host, self._own.ports["dns"]))
                sock.recv(512)


@contextlib.contextmanager
def _own_services(login_host: str) -> Iterator[Peers]:
    """What the device itself offers: a login, on its known port if that is free; a status page and a datagram socket
    for its radio nodes, on loopback."""
    try:
        login = Peers(login_host, ("login",), fixed_ports=True)
    except OSError:
        login = Peers(login_host, ("login",))
    with login, Peers(services=("http", "dns")) as own:
        yield own


def run(
    kind: str, seconds: float, target: str | None = None, router: str | None = None, *, pace: float = 1.0, seed: int = 7
) -> None:
    """Be a device of `kind` for `seconds`. Prints one line of JSON once it is up."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        own = stack.enter_context(_own_services("0.0.0.0" if target else "127.0.0.1"))
        ports = PORTS
        if target is None:
            ports = stack.enter_context(Peers(services=tuple(name for name in PORTS if name != "login"))).ports
        target = target or "127.0.0.1"
        device = Device(KINDS[kind], folder, target, router or target, ports, own, random.Random(seed), pace)
        stack.callback(device.close)
        print(json.dumps({"kind": kind, "ports": ports}), flush=True)
        device.run(Deadline(seconds))


def command(
    kind: str, seconds: float, target: str | None = None, router: str | None = None, *, pace: float = 1.0, seed: int = 7
) -> list[str]:
    """What starts a device as a process of its own; it prints a line once it is up."""
    words = [sys.executable, "-m", MODULE, "--kind", kind, "--seconds", str(seconds)]
    words += ["--pace", str(pace), "--seed", str(seed)] + (["--target", target] if target else [])
    return words + (["--router", router] if router else [])


def spawn(
    kind: str,
    seconds: float,
    target: str | None = None,
    router: str | None = None,
    *,
    pace: float = 1.0,
    seed: int = 7,
    prefix: tuple[str, ...] = (),
) -> "subprocess.Popen[str]":
    """A device as a process of its own, already up; `prefix` is a command to run it under (nsenter --net=...)."""
    return started([*prefix, *command(kind, seconds, target, router, pace=pace, seed=seed)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = "; ".join(f"{name}: {kind.what}" for name, kind in KINDS.items())
    parser.add_argument("--kind", choices=KINDS, default="sensor", help=kinds)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long (default 300)")
    parser.add_argument("--target", metavar="HOST", help="where the peers are (default: its own, on loopback)")
    parser.add_argument("--router", metavar="HOST", help="where names and time come from (default: the target)")
    parser.add_argument(
        "--pace", type=float, default=1.0, help="how much more often the rare things happen (default 1)"
    )
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    leave_cleanly_on_signals()
    run(args.kind, args.seconds, args.target, args.router, pace=args.pace, seed=args.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
