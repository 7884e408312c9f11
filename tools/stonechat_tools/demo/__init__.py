"""Watch agents learn what is normal on two simulated devices, then catch real attacks on them.

Everything is the product itself: the agents with shipped models, an MQTT broker, the collector with its database. The
devices are kept apart from the machine's other work: a board's firmware on MicroPython in virtual time, and a Linux
device in namespaces of its own (as root also in a cgroup, watched with BPF). The attacks are bounded and stay inside.
No root needed; nothing is left behind.

Examples:
  stonechat demo
  stonechat demo --only board
  stonechat demo --json out.json
"""

import argparse
import contextlib
import json
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError, StonechatError
from stonechat.linux import shipped

from stonechat_tools.fleet import keyring, wire
from stonechat_tools.fleet.collect import Collector
from stonechat_tools.fleet.local_broker import LocalBroker
from stonechat_tools.fleet.store import Store

from . import board, gateway
from .scenario import Device, Feed, Figures, Scenario, Stopped, judge
from .words import plain

WIDTH = 80
DEVICES = (board.NAME, gateway.NAME)
_CONNECT_S = 120.0  # an overloaded machine is slow, and not broken
_SETTLE_S = 60.0


def model_file(name: str) -> Path:
    """The file of a model that comes with the package. Raises StonechatError where it is not there."""
    if name not in shipped.names():
        raise StonechatError(f"the model {name} did not come with this package: install it again")
    return Path(shipped.path(name))


class Demo:
    """One run: broker, collector, devices. `figures` has those of each device, `skipped` the reason for each that can't
    be shown here."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.figures: dict[str, Figures] = {}
        self.skipped: dict[str, str] = {}
        self.broker = ""
        self.stored = 0
        self._feeds = {name: Feed() for name in names}
        self._started_s = time.monotonic()
        self._lock = threading.Lock()

    def run(self) -> None:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stonechat-demo-")))
            folder.chmod(0o711)  # started as root, the agent becomes another user and must reach its files
            broker = stack.enter_context(LocalBroker())
            self.broker = broker.kind
            keys = {name: secrets.token_bytes(32) for name in self.names}
            store = stack.enter_context(Store(folder / "fleet.db"))
            collector = stack.enter_context(
                Collector(
                    store,
                    keyring.Keys(keys),
                    host="127.0.0.1",
                    port=broker.port,
                    prefix="stonechat/1/demo",
                    on_report=self._on_report,
                )
            )
            if not collector.connected.wait(_CONNECT_S):
                raise Stopped(f"the collector can't reach the broker: {collector.error}")
            for line in introduction(self.broker):
                print(line, flush=True)
            devices = self._devices(stack, folder, broker.port, keys)
            self._run_all(devices)
            deadline_s = time.monotonic() + _SETTLE_S
            for name, figures in self.figures.items():
                while store.count(name) < figures.reports_published and time.monotonic() < deadline_s:
                    time.sleep(0.1)  # the last acknowledgements
                figures.reports_received = store.count(name)
            self.stored = store.count()
        for figures in self.figures.values():
            judge(figures)

    def _devices(self, stack: contextlib.ExitStack, folder: Path, port: int, keys: dict[str, bytes]) -> list[Device]:
        devices: list[Device] = []
        for name in self.names:
            own = folder / name
            own.mkdir(mode=0o711)
            feed = self._feeds[name]
            if name == board.NAME:
                model = model_file(board.MODEL)
                devices.append(stack.enter_context(board.Board(own, model, port, keys[name], feed)))
                continue
            try:
                there = stack.enter_context(gateway.place(own))
                model = model_file(gateway.MODELS[there.schema])
                devices.append(stack.enter_context(gateway.Gateway(there, own, model, port, keys[name], feed)))
            except (ConfigError, OSError) as error:
                self.skipped[name] = str(error)
                self._say(f"{name}: not shown: {error}")
        return devices

    def _run_all(self, devices: list[Device]) -> None:
        """Every device in a thread of its own, so that neither waits for the other."""
        scenarios = [Scenario(device, self._say) for device in devices]
        threads = []
        for scenario in scenarios:
            self.figures[scenario.figures.device] = scenario.figures
            threads.append(threading.Thread(target=self._one, args=(scenario,), daemon=True))
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.25)
        except BaseException:
            for feed in self._feeds.values():
                feed.stopping.set()
            for thread in threads:
                thread.join(10)
            raise

    def _one(self, scenario: Scenario) -> None:
        try:
            scenario.run()
        except Stopped:
            pass  # the figures say why
        except (StonechatError, OSError) as error:
            scenario.figures.stopped = str(error)
        except ValueError:  # of a file that was closed below it, where a busy machine has let a thread outlive the end
            if not all(feed.stopping.is_set() for feed in self._feeds.values()):
                raise

    def _on_report(self, report: wire.Report) -> None:
        if report.windows and report.device in self._feeds:  # not the answer to a command
            self._feeds[report.device].put(report)

    def _say(self, text: str) -> None:
        with self._lock:
            print(f"[{time.monotonic() - self._started_s:5.1f} s] {text}", flush=True)


def introduction(broker: str) -> Iterator[str]:
    yield "Simulated devices, each with stonechat's agent on it. The agent counts what its"
    yield "device does (connections, bytes, files, programs) in short windows, scores each"
    yield "window with a small neural network, and reports the score by MQTT. First it"
    yield "learns what is normal on its device; then the device is attacked. All stays on"
    yield f"this machine. Broker: {broker}; the reports go to stonechat's collector."
    yield "It takes about a minute and a half."
    yield ""


def table(figures: Figures) -> Iterator[str]:
    """One device's outcome in lines of at most 80 characters."""
    yield f"{figures.device.upper()}: {figures.title}"
    yield f"  {'the device ...':<35} {'alarm after':<11} most unusual"
    for outcome in figures.attacks:
        after = "no alarm"
        if outcome.windows_to_alarm:
            after = f"{outcome.windows_to_alarm} window{'s' if outcome.windows_to_alarm > 1 else ''}"
        yield f"  {outcome.what:<35} {after:<11} {plain(outcome.top_features, WIDTH - 50)}"
    yield (
        f"  {figures.caught} of {len(figures.attacks)} attacks caught. {figures.false_alarms} false alarms in "
        f"{figures.benign_windows} ordinary windows of {figures.window_s:g} s."
    )
    yield (f"  {figures.reports_received} of {figures.reports_published} reports reached the collector's database.")
    if figures.disturbed_windows:
        yield f"  {figures.disturbed_windows} windows in which this machine withheld the processor are not counted."
    if figures.verdict != "passed":
        yield f"  {figures.verdict.upper()}: {figures.why}"


def further() -> Iterator[str]:
    yield "Windows are the devices' own: the board's time is virtual, so its 10 s pass in a"
    yield "moment. To look further, see what stonechat counts on this machine, live:"
    yield f"  {_program()} top"


def _program() -> str:
    program = sys.argv[0] if os.path.basename(sys.argv[0]).startswith("stonechat") else "stonechat"
    near = os.path.relpath(program) if os.sep in program else program
    return near if len(near) < len(program) else program


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE as JSON")
    parser.add_argument("--only", choices=DEVICES, help="show this device alone")


def run(args: argparse.Namespace) -> int:
    demo = Demo((args.only,) if args.only else DEVICES)
    started_s = time.monotonic()
    demo.run()
    seconds = time.monotonic() - started_s
    for figures in demo.figures.values():
        print()
        for line in table(figures):
            print(line)
    for name, reason in demo.skipped.items():
        print(f"\n{name.upper()}: not shown here: {reason}")
    print(f"\n{seconds:.0f} s in all.")
    for line in further():
        print(line)
    if args.json:
        Path(args.json).write_text(json.dumps(as_json(demo, seconds), indent=2) + "\n")
    return 1 if any(figures.verdict == "failed" for figures in demo.figures.values()) or not demo.figures else 0


def as_json(demo: Demo, seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 1),
        "broker": demo.broker,
        "reports_stored": demo.stored,
        "devices": [asdict(figures) | {"caught": figures.caught} for figures in demo.figures.values()],
        "skipped": demo.skipped,
    }
