"""Watch a real agent learn this machine, then catch real attacks, over a real MQTT broker on loopback.

Everything is the product itself: stonechat-agent with the shipped model, a broker, the collector with its database.
The attacks are bounded and touch nothing but loopback and a temporary folder. No root needed; nothing is left behind.

Examples:
  stonechat demo
  stonechat demo --json out.json
  stonechat demo --transport lean --attacks scan_connect,miner
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from stonechat.errors import StonechatError
from stonechat.linux.schemas import LINUX_PROC_1
from stonechat.model import load_model

from stonechat_tools.fleet import keyring, wire
from stonechat_tools.fleet.collect import Collector
from stonechat_tools.fleet.local_broker import LocalBroker
from stonechat_tools.fleet.store import Store
from stonechat_tools.lab import attacks, benign

MODEL = "linux-proc-1-demo"
DEVICE = "demo-device"
ATTACKS = ("scan_connect", "exfil_burst", "ransom", "miner", "brute_in")
BENIGN_WINDOWS = 15
ATTACK_WINDOWS = 4  # windows an attack may last before it counts as missed
QUIET_PERCENT = 15.0  # what keeps the processors busier than this while the agent learns would count as normal
QUIET_S = 4
QUIET_WAIT_S = 45
LEARN_TRIES = 2
RESTLESS_Q8 = 128  # over the model's own benign score: the machine is not as it was when the agent took its centres
CALM_WINDOWS = 15  # at most so many between one attack and the next, until the level is normal again
ALARM = 2
LEVELS = {0: "[green]normal[/]", 1: "[yellow]watch[/]", 2: "[bold red]ALARM[/]"}


def model_file(name: str = MODEL) -> Path:
    """The shipped model: in a working copy's models/, or beside the installed tools."""
    for folder in (Path(__file__).parents[2] / "models", Path(__file__).parent / "models"):
        if (folder / name / "model.tflite").is_file():
            return folder / name / "model.tflite"
    raise StonechatError(f"the model {name} is not here; in a working copy it is models/{name}/model.tflite")


def busy_percent(seconds: float = 1.0) -> float:
    """How busy the machine's processors were over the next `seconds`."""

    def read() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    total, idle = read()
    time.sleep(seconds)
    total_after, idle_after = read()
    return 100.0 * (1 - (idle_after - idle) / max(1, total_after - total))


class Stopped(StonechatError):
    """The pipeline did not do its part; the message says which and what it said last."""


@dataclass
class Outcome:
    """What became of one attack. windows_to_alarm: windows that ended since it began, the alarm's own included."""

    name: str
    alarmed: bool = False
    windows_to_alarm: int | None = None
    top_features: list[str] = field(default_factory=list)
    explained: bool = False


class Agent:
    """The daemon as a process, and what it costs."""

    def __init__(self, folder: Path, port: int, secret: bytes, transport: str) -> None:
        self.folder = folder
        key = folder / "device.key"
        key.touch(mode=0o600)
        key.write_text(secret.hex() + "\n")
        config = folder / "stonechat.toml"
        config.write_text(
            f"""[device]
id = "{DEVICE}"
fleet = "demo"
key_file = "{key}"
state_file = "{folder}/state/state"
[model]
file = "{model_file()}"
[collector]
interfaces = {json.dumps(sorted(os.listdir("/sys/class/net")))}
bpf = false
[mqtt]
host = "127.0.0.1"
port = {port}
tls = false   # loopback only: a device in the field leaves this out
transport = "{transport}"
[report]
heartbeat_windows = 1
bytes_per_day = 100000000
outbox_dir = "{folder}/outbox"
"""
        )
        self._log = folder / "agent.log"
        command = [str(Path(sys.executable).parent / "stonechat-agent"), "--config", str(config)]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._started_s = time.monotonic()

    def alive(self) -> bool:
        return self._process.poll() is None

    def said(self) -> list[str]:
        return self._log.read_text(errors="replace").strip().splitlines()

    def cost(self) -> tuple[float, int]:
        """(share of one core in percent since its start, resident bytes)."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        cpu_s = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        rss = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 100 * cpu_s / (time.monotonic() - self._started_s), rss

    def stop(self) -> int:
        """End it in good order -> the number of reports that it says it has published."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        told = re.findall(r"(\d+) reports published", self.said()[-1] if self.said() else "")
        return int(told[-1]) if told else 0


class Listener:
    """An ordinary subscriber beside the collector: mosquitto_sub where it is installed, else paho."""

    def __init__(self, port: int) -> None:
        self.payloads: set[bytes] = set()
        self._topic = f"stonechat/1/demo/{DEVICE}/report"
        self._process: subprocess.Popen[str] | None = None
        program = shutil.which("mosquitto_sub")
        self.kind = "mosquitto_sub" if program else "paho-mqtt"
        if program:
            command = [program, "-h", "127.0.0.1", "-p", str(port), "-t", self._topic, "-q", "1", "-F", "%x"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
            threading.Thread(target=self._read, daemon=True).start()
        else:
            from paho.mqtt import client as paho
            from paho.mqtt.enums import CallbackAPIVersion

            client = self._client = paho.Client(CallbackAPIVersion.VERSION2)
            client.on_connect = self._subscribe
            client.on_message = lambda _client, _data, message: self.payloads.add(bytes(message.payload))
            client.connect("127.0.0.1", port)
            client.loop_start()

    def _subscribe(self, client: Any, *_: Any) -> None:
        client.subscribe(self._topic, 1)

    def _read(self) -> None:
        assert self._process and self._process.stdout
        for line in self._process.stdout:
            self.payloads.add(bytes.fromhex(line.strip()))

    def stop(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()
        else:
            self._client.disconnect()
            self._client.loop_stop()


class Demo:
    """One run from the broker's start to the summary."""

    def __init__(self, console: Console, args: argparse.Namespace) -> None:
        self.console = console
        self.args = args
        self.names = [name for name in args.attacks.split(",") if name]
        self.metadata = load_model(model_file().read_bytes()).metadata
        self.window_s = self.metadata.window_ms / 1000
        self.features = [column[0] for column in LINUX_PROC_1.columns]
        self._reports: list[wire.Report] = []
        self._arrived = threading.Condition()

    def run(self) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stonechat-demo-")))
            folder.chmod(0o711)  # started as root, the agent becomes another user and must reach its state
            broker = stack.enter_context(LocalBroker())
            self.console.print(f"broker: {broker.kind} on 127.0.0.1:{broker.port}")
            self._wait_for_quiet()
            secret = secrets.token_bytes(32)
            store = Store(folder / "fleet.db")
            stack.callback(store.close)
            collector = stack.enter_context(
                Collector(
                    store,
                    keyring.Keys({DEVICE: secret}),
                    host="127.0.0.1",
                    port=broker.port,
                    prefix="stonechat/1/demo",
                    on_report=self._on_report,
                )
            )
            if not collector.connected.wait(10):
                raise Stopped(f"the collector can't reach the broker: {collector.error}")
            listener = Listener(broker.port)
            stack.callback(listener.stop)
            workload = benign.spawn("sensor", 900, pace=4)
            stack.callback(_end, workload)
            stack.callback(lambda: hasattr(self, "agent") and self.agent.alive() and self.agent.stop())
            published = self._learn(lambda: Agent(folder, broker.port, secret, self.args.transport))
            return self._watch(listener, store, published)

    def _learn(self, start: Callable[[], Agent]) -> int:
        """Start the agent and let it learn, anew where the machine was restless meanwhile -> the reports published by
        agents that were started in vain."""
        learn = self.metadata.learn_windows
        published = 0
        for left in reversed(range(LEARN_TRIES)):
            self.agent = start()
            self._phase("learning what is normal on this machine", learn)
            # In the second half the centres are learned: a machine that stays as it was scores as the model expects.
            scores = sorted(report.score_q8 or 0 for report in self._reports[-(learn // 2) :])
            if scores[len(scores) // 2] <= self.metadata.location_q8 + RESTLESS_Q8 or not left:
                break
            self.console.print("this machine changed while the agent learned it: once more")
            published += self.agent.stop()
            shutil.rmtree(self.agent.folder / "state")
            self._wait_for_quiet()
        return published

    def _watch(self, listener: Listener, store: Store, published: int) -> dict[str, Any]:
        learned = len(self._reports)
        self._phase("benign: an ordinary device at work", BENIGN_WINDOWS)
        benign_reports = self._reports[learned:]
        outcomes = [self._attack(name) for name in self.names]
        cpu_percent, rss_bytes = self.agent.cost()
        published += self.agent.stop()
        time.sleep(1.0)  # the last acknowledgements
        return {
            "model": self.metadata.name,
            "window_s": self.window_s,
            "learning_windows": self.metadata.learn_windows,
            "benign_windows": len(benign_reports),
            "false_alarms": sum(1 for report in benign_reports if report.level == ALARM),
            "attacks": [vars(outcome) for outcome in outcomes],
            "reports_published": published,
            "reports_stored": store.count(),
            "reports_seen_by_subscriber": len(listener.payloads),
            "subscriber": listener.kind,
            "agent_cpu_percent": round(cpu_percent, 3),
            "agent_rss_bytes": rss_bytes,
            "transport": self.args.transport,
        }

    def _wait_for_quiet(self) -> None:
        """An install that has just ended still writes; what goes on while the agent learns is what it takes for
        normal. Wait a little for a quiet machine, and say so where it does not become one."""
        os.sync()
        quiet_s = 0
        progress, task = self._progress("waiting for a quiet machine", QUIET_S, "quiet seconds")
        with progress:
            deadline_s = time.monotonic() + QUIET_WAIT_S
            while quiet_s < QUIET_S and time.monotonic() < deadline_s:
                quiet_s = quiet_s + 1 if busy_percent() < QUIET_PERCENT else 0
                progress.update(task, completed=quiet_s)
        if quiet_s < QUIET_S:
            self.console.print(
                "[yellow]this machine is busy with other work: the agent will learn that as normal, and may miss "
                "attacks that are no louder[/]"
            )

    # --- phases -----------------------------------------------------------------------------------------------------

    def _phase(self, what: str, windows: int) -> None:
        """Wait for `windows` more reports under a progress bar."""
        start = len(self._reports)
        progress, task = self._progress(what, windows)
        with progress:
            while len(self._reports) - start < windows:
                self._next_report()
                progress.update(task, completed=len(self._reports) - start, last=self._line())

    def _attack(self, name: str) -> Outcome:
        """Let the level settle, begin the attack at a window's edge, and watch until the alarm."""
        self._settle()
        outcome = Outcome(name)
        about = attacks.ATTACKS[name]
        self._next_report()  # a window has just ended: the attack fills the ones that follow
        with tempfile.TemporaryDirectory(prefix="stonechat-demo-") as folder:
            process = attacks.spawn(name, ATTACK_WINDOWS * self.window_s + 1, folder=folder)
            try:
                progress, task = self._progress(f"attack: {about.what}", ATTACK_WINDOWS)
                with progress:
                    for window in range(1, ATTACK_WINDOWS + 1):
                        report = self._next_report()
                        progress.update(task, completed=window, last=self._line())
                        if report.level == ALARM:
                            outcome.alarmed = True
                            outcome.windows_to_alarm = window
                            break
            finally:
                _end(process)
        top = self._reports[-1].features
        outcome.top_features = [self.features[feature.index] for feature in top]
        outcome.explained = any(feature in about.features for feature in outcome.top_features)
        return outcome

    def _settle(self) -> None:
        for _ in range(CALM_WINDOWS):
            if self._reports[-1].level == 0:
                return
            self._next_report()

    def _next_report(self) -> wire.Report:
        """The next report that the collector has committed. Raises Stopped when none comes within ten windows."""
        with self._arrived:
            have = len(self._reports)
            deadline_s = time.monotonic() + max(20.0, 10 * self.window_s)
            while len(self._reports) == have:
                self._arrived.wait(0.5)
                if not self.agent.alive() or time.monotonic() > deadline_s:
                    said = self.agent.said()
                    why = "stopped" if not self.agent.alive() else "sends nothing"
                    raise Stopped(f"the agent {why}; it said: {said[-1] if said else 'nothing'}")
            return self._reports[have]

    def _on_report(self, report: wire.Report) -> None:
        with self._arrived:
            if report.windows:  # not the answer to a command
                self._reports.append(report)
                self._arrived.notify_all()

    # --- what is shown ------------------------------------------------------------------------------------------------

    def _progress(self, what: str, total: int, unit: str = "windows") -> tuple[Progress, TaskID]:
        """A line that says what goes on, and under it the bar (a terminal only) with the last report."""
        self.console.print(what, highlight=False)
        progress = Progress(
            BarColumn(24),
            TextColumn("{task.completed}/{task.total} " + unit),
            TextColumn("{task.fields[last]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        return progress, progress.add_task(what, total=total, last="")

    def _line(self) -> str:
        report = self._reports[-1]
        causes = ", ".join(
            f"{self.features[feature.index]} {feature.deviation:+.1f} sd" for feature in report.features[:2]
        )
        return f"{LEVELS[report.level]} evidence {(report.evidence_q8 or 0) / 2.56:.0f} % {causes}"


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def summary(figures: dict[str, Any]) -> Iterator[Any]:
    """What the run showed, as things that rich prints."""
    table = Table("attack", "caught", "windows to alarm", "top features", "explained")
    for attack in figures["attacks"]:
        table.add_row(
            attack["name"],
            "[green]yes[/]" if attack["alarmed"] else "[red]no[/]",
            str(attack["windows_to_alarm"] or "-"),
            ", ".join(attack["top_features"]),
            "[green]yes[/]" if attack["explained"] else "[red]no[/]",
        )
    yield table
    yield f"benign windows {figures['benign_windows']}, false alarms {figures['false_alarms']}"
    yield (
        f"reports: {figures['reports_published']} published, {figures['reports_stored']} stored, "
        f"{figures['reports_seen_by_subscriber']} seen by {figures['subscriber']}"
    )
    yield (
        f"agent: {figures['agent_cpu_percent']:.2f} % of one core, {figures['agent_rss_bytes'] / 1e6:.1f} MB resident "
        f"({figures['transport']} transport)"
    )


def worked(figures: dict[str, Any]) -> str | None:
    """None where the pipeline worked whole, else what did not."""
    windows = figures["learning_windows"] + figures["benign_windows"]
    if figures["reports_stored"] < windows:
        return f"only {figures['reports_stored']} reports were stored for more than {windows} windows"
    if figures["reports_seen_by_subscriber"] < figures["reports_stored"]:
        return "the database holds reports that an ordinary subscriber did not see"
    caught = sum(1 for attack in figures["attacks"] if attack["alarmed"])
    if caught < len(figures["attacks"]) - 1:
        return f"only {caught} of {len(figures['attacks'])} attacks raised an alarm"
    if figures["false_alarms"]:
        return f"{figures['false_alarms']} windows of ordinary work were in alarm"
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE as JSON")
    parser.add_argument("--transport", choices=("paho", "lean"), default="paho", help="the agent's MQTT client")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="which, by comma (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    unknown = [name for name in args.attacks.split(",") if name and name not in attacks.ATTACKS]
    if unknown:
        raise StonechatError(f"no attack is called {', '.join(unknown)}; known: {', '.join(attacks.ATTACKS)}")
    console = Console()
    started_s = time.monotonic()
    figures = Demo(console, args).run()
    figures["seconds"] = round(time.monotonic() - started_s, 1)
    for part in summary(figures):
        console.print(part, highlight=False)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    trouble = worked(figures)
    if trouble:
        console.print(f"[red]{trouble}[/]")
        return 1
    return 0
