"""Detection through outages: does the agent score every window while the broker can't be reached?

Each outage is made for real, in a network and mount namespace of its own (root): name servers that never answer,
addresses that swallow every packet, hosts that accept a connection and say nothing. The agent runs in it as it runs on
a device, once for each transport; windows that it scored are compared with the windows that passed.

Examples:
  python -m stonechat_tools.proofs.outages                              # all, 150 s each
  python -m stonechat_tools.proofs.outages --seconds 30 --outage silent-resolver --transport paho

inside() is for other tests: the command that runs an agent, or any program, in one of the outages.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..console import model_path

NAME = "broker.example.org"
TRANSPORTS = ("auto", "paho")
MARGIN = 3  # windows: the first only primes, one may be under way at each end
_STOP_S = 20.0
_SWALLOWING = (  # the other end of the pair takes no packet for a hardware address that is not its own
    "link add out0 type veth peer name far0",
    "link set out0 arp off",
    "addr add 10.78.0.1/16 dev out0",
    "link set far0 up",
    "link set out0 up",
)
AGENT = str(Path(sys.executable).parent / "stonechat-agent")
MODEL = model_path("linux-proc-1")


@dataclass(frozen=True)
class Outage:
    """host, port, tls: for the agent's configuration. name_servers: addresses, all of them silent. addresses: of NAME.
    server: "silent" accepts connections on `port` and never answers, "" is none."""

    about: str
    host: str = NAME
    port: int = 8883
    tls: bool = False
    name_servers: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    server: str = ""


_DEAD = tuple(f"10.78.1.{i}" for i in range(1, 9))
OUTAGES = {
    "silent-resolver": Outage("two name servers that never answer", name_servers=("10.78.0.2", "10.78.0.3")),
    "dead-addresses": Outage("eight addresses that swallow packets", addresses=_DEAD),
    "dead-address-tls": Outage("one address that swallows packets, TLS", addresses=("10.78.1.1",), tls=True),
    "silent-tls": Outage("TCP connects, TLS is never answered", host="localhost", tls=True, server="silent"),
    "silent-broker": Outage("TCP connects, CONNECT is never answered", host="127.0.0.1", server="silent"),
    "refused": Outage("nothing listens", host="127.0.0.1"),
    "no-route": Outage("no route to the broker", host="192.0.2.7"),
}


def inside(name: str, command: list[str]) -> list[str]:
    """The command line that runs `command` in the outage; SIGTERM to it ends `command` with SIGTERM. Needs root."""
    ours = [sys.executable, "-m", "stonechat_tools.proofs.outages", "--inside", name, "--", *command]
    return ["unshare", "--net", "--mount", *ours]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30)


def _cover(path: str, text: str, folder: Path) -> None:
    """Put `text` in the place of a system file, for this mount namespace only."""
    ours = folder / path.rsplit("/", 1)[-1]
    ours.write_text(text)
    ours.chmod(0o644)
    subprocess.run(["mount", "--bind", str(ours), path], check=True, timeout=30)


@contextmanager
def _server(outage: Outage) -> Iterator[None]:
    if not outage.server:
        yield
        return
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", outage.port))
    listener.listen(64)
    held: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                held.append(listener.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        listener.close()


def _run_inside(name: str, command: list[str]) -> int:
    """In the new namespaces: make the outage, run the command -> its exit status."""
    outage = OUTAGES[name]
    _ip("link", "set", "lo", "up")
    if name != "no-route":
        for words in _SWALLOWING:
            _ip(*words.split())
    with tempfile.TemporaryDirectory(prefix="stonechat-outage-") as scratch, _server(outage):
        folder = Path(scratch)
        folder.chmod(0o755)
        servers = "".join(f"nameserver {address}\n" for address in outage.name_servers or ("127.0.0.1",))
        _cover("/etc/resolv.conf", servers, folder)
        names = "".join(f"{address} {NAME}\n" for address in outage.addresses)
        _cover("/etc/hosts", "127.0.0.1 localhost\n" + names, folder)
        if Path("/etc/nsswitch.conf").exists():
            _cover("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n", folder)
        process = subprocess.Popen(command)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        return process.wait()


CONFIG = """[device]
id = "outage-1"
key_file = "{folder}/device.key"
state_file = "{folder}/state/state"
[model]
file = "{model}"
[collector]
bpf = false
[mqtt]
host = "{outage.host}"
port = {outage.port}
tls = {tls}
transport = "{transport}"
[report]
heartbeat_windows = 1
outbox_dir = "{folder}/outbox"
"""


@dataclass(frozen=True)
class Trial:
    """windows: that the agent scored; possible: that passed; log: what it said."""

    windows: int
    possible: int
    stop_s: float
    log: str

    @property
    def holds(self) -> bool:
        return self.windows >= self.possible - MARGIN


def trial(name: str, transport: str, model: Path, window_s: float, seconds: float, agent: list[str]) -> Trial:
    """Run the agent (its command line without --config) in the outage for `seconds`."""
    outage = OUTAGES[name]
    with tempfile.TemporaryDirectory(prefix="stonechat-outage-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        key = folder / "device.key"
        key.touch(mode=0o600)
        key.write_text("01" * 32 + "\n")
        tls = str(outage.tls).lower()
        text = CONFIG.format(folder=folder, model=model, outage=outage, tls=tls, transport=transport)
        config = folder / "stonechat.toml"
        config.write_text(text)
        log = folder / "log"
        with open(log, "wb") as file:
            process = subprocess.Popen(inside(name, [*agent, "--config", str(config)]), stdout=file, stderr=file)
        try:
            deadline_s = time.monotonic() + 60
            while "windows of" not in log.read_text() and process.poll() is None and time.monotonic() < deadline_s:
                time.sleep(0.02)
            began_s = time.monotonic()
            time.sleep(seconds)
            passed_s = time.monotonic() - began_s
            process.terminate()
            process.wait(_STOP_S + 60)
            stop_s = time.monotonic() - began_s - passed_s
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        said = log.read_text()
    found = re.search(r"stopped after (\d+) windows", said)
    return Trial(int(found[1]) if found else 0, int(passed_s / window_s), stop_s, said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=150.0, help="for each trial (default %(default)s)")
    parser.add_argument("--outage", action="append", choices=sorted(OUTAGES), help="this one only (again for more)")
    parser.add_argument("--transport", action="append", help="this one only (again for more)")
    parser.add_argument("--agent", default="", help="the agent's command, in one text (default: stonechat-agent)")
    parser.add_argument("--model", type=Path, default=MODEL, help="with windows of 5 s (default %(default)s)")
    parser.add_argument("command", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return _run_inside(args.inside, args.command)
    agent = args.agent.split() or [AGENT]
    return 0 if run(args.outage or list(OUTAGES), args.transport or TRANSPORTS, args.model, args.seconds, agent) else 1


def run(names: Sequence[str], transports: Sequence[str], model: Path, seconds: float, agent: list[str]) -> bool:
    """Every outage with every transport, all at once, printed -> whether all windows were scored."""
    pairs = [(name, way) for name in names for way in transports]
    with ThreadPoolExecutor(len(pairs)) as pool:  # each waits nearly all of the time
        started = [pool.submit(trial, name, way, model, 5.0, seconds, agent) for name, way in pairs]
        trials = [future.result() for future in started]
    for (name, way), one in zip(pairs, trials, strict=True):
        verdict = "holds" if one.holds else "FAILS"
        print(f"{name:18} {way:6} {one.windows:5} of {one.possible:5} windows, stop {one.stop_s:5.1f} s  {verdict}")
        if not one.holds:
            print("    " + "\n    ".join(one.log.strip().splitlines()[-3:]))
    return all(one.holds for one in trials)


def soak(scale: float) -> bool:
    """Fifteen minutes of each outage."""
    if os.geteuid() != 0:
        print("left out: network namespaces need root")
        return True
    return run(list(OUTAGES), TRANSPORTS, MODEL, max(30.0, 900 * scale), [AGENT])


if __name__ == "__main__":
    sys.exit(main())
