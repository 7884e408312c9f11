"""What the whole agent takes on Linux: resident memory and CPU, connected to a broker, for each transport.

Each row is the real daemon (`stonechat-agent`) with a reference model, provisioned by `stonechat provision`, connected
to a mosquitto on loopback, with client certificates where it says TLS. `no transport` is the same process with
everything loaded but an MQTT client. Resident memory after three seconds, in MB of 10^6 bytes; then its CPU, as a share
of one core. Rows with BPF need root.

Examples:
  stonechat bench agent
  stonechat bench agent --seconds 60 --json agent.json
"""

import argparse
import compileall
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import stonechat
from stonechat.errors import ConfigError
from stonechat.linux import shipped

HELP = "the whole agent on Linux: memory and CPU, by transport, with and without BPF"
DEVICE = "bench-1"
SETTLE_S = 3.0
START_S = 30.0
MODELS = {False: "linux-proc-1", True: "linux-1"}
TRANSPORTS = {  # what is measured: (transport of the configuration, how the broker is reached)
    "no transport": ("auto", ""),
    "auto": ("auto", "plain"),
    "auto, TLS": ("auto", "mtls"),
    "paho": ("paho", "plain"),
    "paho, TLS": ("paho", "mtls"),
}
# The daemon with its MQTT client taken away before anything of it is loaded.
_NO_TRANSPORT = """
import sys, time
from stonechat.linux import daemon
class Nothing:
    connected = True
    refused = 0
    poll = staticmethod(time.sleep)
    publish = close = subscribe = staticmethod(lambda *_: None)
    resolver = None
class Connectable(Nothing):
    def __call__(self, credentials):
        return Nothing
daemon.prepare = lambda config: Connectable()
raise SystemExit(daemon.main(int(sys.argv[1])))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=15.0, help="CPU is measured over (default %(default)s)")
    parser.add_argument("--models", type=Path, default=Path(shipped.FOLDER), help="folder of the reference models")


def run(args: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {"rows": [], "left_out": {}}
    for bpf in MODELS:
        for name, (transport, auth) in TRANSPORTS.items():
            if bpf and os.geteuid():
                figures["left_out"]["with BPF"] = "not root"
                continue
            row = measure(args.models / MODELS[bpf] / "model.tflite", bpf, transport, auth, args.seconds)
            figures["rows"].append({"what": name, "bpf": bpf} | row)
    show(figures)
    return figures


def measure(model: Path, bpf: bool, transport: str, auth: str, seconds: float) -> dict[str, float]:
    """-> {"rss_kib", "cpu_percent"} of one agent. Raises ConfigError with the agent's last words."""
    from stonechat_tools.fleet import broker_config
    from stonechat_tools.fleet.local_broker import LocalBroker, free_port
    from stonechat_tools.fleet.provision import Fleet, Settings

    # An installed agent has its bytecode beside it; a working copy may not, and compiling leaves 2 MB behind at times.
    compileall.compile_dir(Path(stonechat.__file__).parent, quiet=2)
    with tempfile.TemporaryDirectory(prefix="stonechat-bench-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o711)  # the agent becomes another user, and mosquitto too
        port = free_port()
        place = folder / "fleet" / "devices" / DEVICE
        settings = Settings("localhost", port, auth=auth or "plain", install_dir=str(place))
        fleet = Fleet.init(folder / "fleet", settings)
        fleet.add(DEVICE)
        (folder / "fleet").chmod(0o711)
        config = place / "stonechat.toml"
        extra = f'transport = "{transport}"\n[collector]\nbpf = {str(bpf).lower()}\n'
        extra += f'[report]\noutbox_dir = "{folder}/outbox"\n'
        text = config.read_text().replace(f"{place}/model.tflite", str(model.resolve()))
        text = text.replace("[device]", f'[device]\nstate_file = "{folder}/state/state"')
        config.write_text(text + extra)
        broker_file = broker_config.write(fleet, "127.0.0.1", ["localhost"])
        with LocalBroker(broker_file.read_text(), port):
            return _watch(_start(config, auth), auth, seconds)


def _start(config: Path, auth: str) -> "subprocess.Popen[str]":
    if auth:
        command = [str(Path(sys.executable).parent / "stonechat-agent"), "--config", str(config)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    import marshal

    from stonechat.linux import config as configuration

    handed_fd = os.memfd_create("stonechat-config", 0)
    os.write(handed_fd, marshal.dumps(configuration.load(str(config))))
    os.lseek(handed_fd, 0, os.SEEK_SET)
    command = [sys.executable, "-P", "-c", _NO_TRANSPORT, str(handed_fd)]
    try:
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, pass_fds=[handed_fd])
    finally:
        os.close(handed_fd)


def _watch(agent: "subprocess.Popen[str]", auth: str, seconds: float) -> dict[str, float]:
    awaited = "connected to" if auth else "windows of"
    try:
        deadline_s = time.monotonic() + START_S
        said = ""
        while awaited not in said and time.monotonic() < deadline_s:
            line = agent.stderr.readline() if agent.stderr else ""
            said += line
            if not line:
                raise ConfigError(f"the agent ended: {said.strip()[-400:]}")
        time.sleep(SETTLE_S)
        before_s, began_s = _cpu_s(agent.pid), time.monotonic()
        time.sleep(seconds)
        cpu_percent = 100 * (_cpu_s(agent.pid) - before_s) / (time.monotonic() - began_s)
        status = Path(f"/proc/{agent.pid}/status").read_text()
        return {"rss_kib": int(status.split("VmRSS:")[1].split()[0]), "cpu_percent": round(cpu_percent, 3)}
    finally:
        agent.terminate()
        try:
            agent.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.communicate()


def _cpu_s(pid: int) -> float:
    """CPU time used so far, in seconds, to the nanosecond (/proc/PID/schedstat; /proc/PID/stat counts in ticks)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("the agent", "BPF", "resident", "of a core", title="stonechat-agent on Linux")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in figures["rows"]:
        table.add_row(
            row["what"],
            "yes" if row["bpf"] else "no",
            f"{row['rss_kib'] * 1024 / 1e6:,.1f} MB",
            f"{row['cpu_percent']:.3f} %",
        )
    Console().print(table)
    for name, reason in figures["left_out"].items():
        Console().print(f"left out: {name}: {reason}")
