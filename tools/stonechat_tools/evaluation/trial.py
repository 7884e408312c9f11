"""Test a model against live attacks: simulated devices in sandboxes, one agent for each, every attack in turn.

The verdicts come from `stonechat top --json`, which computes them as the agent does, on this machine's kernel; what is
usual for each host is learned in the windows of the model's learning, in place of a day. Each device learns, runs some
benign windows, and then receives its share of the attacks, one after the other, with a pause between them. Several
sandboxes can run in parallel (--boxes); each attack still happens once for each kind of device. With --loopback
everything is on the device's loopback; otherwise its peers and attackers are across a veth pair. A model of
linux-proc-1 sees processor, memory and paging of the whole machine: leave the machine idle, or make each device a guest
with --guests. Needs root; leaves nothing behind.

Examples:
  stonechat trial models/linux-1/model.tflite --boxes 3 --json trial.json
  stonechat trial models/linux-1/model.tflite --kinds sensor,gateway --attacks scan_1ps,ransom --traces recorded/
  stonechat trial models/linux-proc-1/model.tflite --guests --boxes 4
  stonechat trial linux-service-1 --kinds web,cron --attacks shell_recon,miner,ransom
  stonechat trial models/linux-proc-1/model.tflite --loopback --attacks scan_connect,miner
"""

import argparse
import contextlib
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from stonechat.errors import ConfigError, StonechatError
from stonechat.linux import schemas, shipped
from stonechat.model import load_model
from stonechat.schema import Schema

from stonechat_tools.console import check_writable, named, read_file, read_json, write_atomic
from stonechat_tools.lab import attacks, benign, box, guest, netns
from stonechat_tools.lab.bounds import stopped
from stonechat_tools.modeling.fit import DEFAULT_ALARM_RULES
from stonechat_tools.traces.format import BENIGN, TraceWriter

CALM_WINDOWS = 10  # benign windows that are counted for false alarms, before the first attack
WINDOWS = 12  # that an attack may last
REST_WINDOWS = 60  # at most this many after an attack, until the evidence is gone
SETTLE_WINDOWS = 4  # and at least this many: work in progress ends, files are written back
_SETTLED = 0.05  # of an alarm
_LONGEST_S = 24 * 3600.0
_WATCHER = (sys.executable, "-m", "stonechat_tools.cli", "top", "--json", "--model")
Show = Callable[[str], None]


class Stage:
    """One device at work, who watches it, and where attacks on it begin. lines: what `stonechat top --json` prints
    there; kill: ends the watcher, from any thread."""

    def __init__(self, lines: IO[str], kill: Callable[[], None], loopback: bool = False) -> None:
        self._lines = lines
        self.kill = kill
        self._loopback = loopback

    def window(self) -> dict[str, Any]:
        """Wait for the next one."""
        line = self._lines.readline()
        if not line:
            raise StonechatError("the watcher ended")
        window: dict[str, Any] = json.loads(line)
        return window

    @contextlib.contextmanager
    def attacked(self, name: str) -> Iterator[None]:
        """The attack has begun, and goes on until this is left."""
        inside = not attacks.ATTACKS[name].at_device or self._loopback
        target = None if self._loopback else netns.NETWORK if inside else netns.DEVICE
        stop = self._begin(name, target, inside)
        try:
            yield
        finally:
            stop()

    def _begin(self, name: str, target: str | None, inside: bool) -> Callable[[], object]:
        raise NotImplementedError


class BoxStage(Stage):
    def __init__(self, device_box: box.Box, lines: IO[str], kill: Callable[[], None], loopback: bool) -> None:
        super().__init__(lines, kill, loopback)
        self._box = device_box

    def _begin(self, name: str, target: str | None, inside: bool) -> Callable[[], object]:
        prefix, folder = (self._box.inside, self._box.folder) if inside else (self._box.net.outside, None)
        process = attacks.spawn(name, _LONGEST_S, target, folder=folder, prefix=prefix)
        return lambda: stopped(process)


class GuestStage(Stage):
    def __init__(self, console: guest.Console) -> None:
        super().__init__(console.windows, console.kill)
        self._console = console

    def _begin(self, name: str, target: str | None, inside: bool) -> Callable[[], object]:
        if inside:
            self._console.start(attacks.command(name, _LONGEST_S, target))
            return self._console.stop
        process = attacks.spawn(name, _LONGEST_S, target, prefix=self._console.outside)
        return lambda: stopped(process)


@contextlib.contextmanager
def box_stage(model: str, kind: str, pace: float, seed: int, with_bpf: bool, loopback: bool) -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        device_box = stack.enter_context(box.box(_LONGEST_S, in_cgroup=with_bpf))
        peers = (None, None) if loopback else (device_box.net.peers, device_box.net.router)
        stack.callback(stopped, benign.spawn(kind, _LONGEST_S, *peers, pace=pace, seed=seed, prefix=device_box.inside))
        meta = load_model(read_file(model)).metadata
        command = [
            *device_box.watching,
            *_WATCHER,
            model,
            "--peers",
            str(meta.learn_windows),
            *device_box.options,
            *(["--interface", "lo"] if loopback else []),
        ]
        watcher = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(watcher.kill)
        if watcher.stdout:
            yield BoxStage(device_box, watcher.stdout, watcher.kill, loopback)


@contextlib.contextmanager
def guest_stage(model: str, kind: str, pace: float, seed: int) -> Iterator[Stage]:
    workload = benign.command(kind, _LONGEST_S, netns.PEERS, netns.ROUTER, pace=pace, seed=seed)
    with guest.console(_LONGEST_S, workload, [*_WATCHER, model]) as console:
        yield GuestStage(console)


class Trial:
    """What one device goes through. trace: where its windows go, labelled; those of the rest after an attack are left
    out."""

    def __init__(self, name: str, stage: Stage, trace: TraceWriter | None) -> None:
        self.name = name
        self._stage = stage
        self._trace = trace
        self._held: dict[str, Any] | None = None  # a window that was read, and still counts

    def learn(self) -> int:
        """-> how many windows it learned from."""
        learned = 0
        while (verdict := self._window(BENIGN)) is None or verdict["learning"]:
            learned += verdict is not None
        return learned

    def calm(self, windows: int) -> int:
        """-> how many alarms there were in N benign windows."""
        levels = ["", *(self._window(BENIGN)["level"] for _ in range(windows))]
        return sum(level == "alarm" and before != "alarm" for before, level in zip(levels, levels[1:], strict=False))

    def attack(self, name: str, windows: int, whole: bool = False, default_windows: int = 0) -> dict[str, Any]:
        """Run the attack for at most N windows, until the alarm (whole: for N windows), and until the default alarm
        rules would have raised one too, for at most default_windows; then let the device come to rest."""
        outcome: dict[str, Any] = {"device": self.name, "attack": name, "windows_to_alarm": None, "top_features": []}
        outcome["windows"] = windows
        default = DefaultRules()
        peak = 0.0
        with self._stage.attacked(name):
            self._skip_to(time.time())
            for n in range(1, max(windows, default_windows) + 1):
                verdict = self._window(name)
                default.weigh(verdict["surprise"])
                if n <= windows and verdict["evidence"] >= peak:
                    peak = verdict["evidence"]
                    outcome["top_features"] = [shown["feature"] for shown in verdict["explain"]]
                if n <= windows and verdict["level"] == "alarm" and outcome["windows_to_alarm"] is None:
                    outcome["windows_to_alarm"] = n
                decided = n >= windows or bool(outcome["windows_to_alarm"]) and not whole
                if decided and (default.alarm_after or n >= default_windows):
                    break
        if default_windows:
            outcome["default_windows_to_alarm"] = default.alarm_after
            outcome["default_windows"] = default_windows
        outcome["peak_evidence"] = peak
        outcome["explained"] = bool(set(outcome["top_features"]) & set(attacks.ATTACKS[name].features))
        rested = 0
        while rested < REST_WINDOWS and (self._window(None)["evidence"] >= _SETTLED or rested < SETTLE_WINDOWS):
            rested += 1
        outcome["windows_to_normal"] = rested
        return outcome

    def _skip_to(self, begun_s: float) -> None:
        """Leave out the windows that ended before the attack began: on a busy machine it takes some to start."""
        while self._held is None:
            window = self._stage.window()
            if window["time_s"] >= begun_s + 0.1:  # it is rounded
                self._held = window

    def _window(self, label: str | None) -> Any:
        """-> the verdict, None while the collector settles. Writes the scored windows that have a label."""
        window, self._held = self._held or self._stage.window(), None
        if self._trace and label is not None and window["verdict"]:
            self._trace.append(window["time_s"], window["elapsed_ms"], label, window["deltas"])
        return window["verdict"]


class DefaultRules:
    """The evidence by the default alarm rules, from the surprise of each window since an attack began. `alarm_after`:
    the number of the first window with an alarm, None until then."""

    def __init__(self) -> None:
        self._evidence = [0.0] * len(DEFAULT_ALARM_RULES)
        self._windows = 0
        self.alarm_after: int | None = None

    def weigh(self, surprise: float) -> None:
        self._windows += 1
        for i, (allowance, cap, threshold) in enumerate(DEFAULT_ALARM_RULES):
            self._evidence[i] = max(0.0, self._evidence[i] + min(surprise, cap / 256) - allowance / 256)
            if self._evidence[i] >= threshold / 256 and self.alarm_after is None:
                self.alarm_after = self._windows


def deal(kinds: list[str], names: list[str], boxes: int) -> list[tuple[str, list[str]]]:
    """-> (kind, its attacks) for each box: the attacks of a kind over as many boxes as its share of `boxes`."""
    shares = max(1, min(boxes // len(kinds), len(names)))
    each = math.ceil(len(names) / shares)
    return [(kind, names[at : at + each]) for kind in kinds for at in range(0, len(names), each)]


class Trials:
    """The devices of one trial. `stop()` ends all of them from another thread."""

    def __init__(self, args: argparse.Namespace, schema: Schema, window_ms: int, show: Show) -> None:
        self._args = args
        self._schema = schema
        self._window_ms = window_ms
        self._show = show
        self._stages: list[Stage] = []
        self._stopping = False

    def stop(self) -> None:
        self._stopping = True
        for stage in self._stages:
            stage.kill()

    def one(self, name: str, kind: str, names: list[str], seed: int) -> dict[str, Any]:
        """One device's trial by the attacks of these names -> its figures."""
        args = self._args
        device = (args.model, kind, args.pace, seed)
        with contextlib.ExitStack() as stack:
            if args.guests:
                stage = stack.enter_context(guest_stage(*device))
            else:
                stage = stack.enter_context(box_stage(*device, self._schema is schemas.LINUX_1, args.loopback))
            self._stages.append(stage)
            if self._stopping:
                raise StonechatError(f"{name}: stopped")
            trace = stack.enter_context(self._writer(name)) if args.traces else None
            return self._go_through(Trial(name, stage, trace), names)

    def _writer(self, name: str) -> TraceWriter:
        folder = Path(self._args.traces)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{int(time.time())}.csv.gz"
        return TraceWriter(path, self._schema, self._window_ms, name, {"pace": f"{self._args.pace:g}"})

    def _go_through(self, trial: Trial, names: list[str]) -> dict[str, Any]:
        calm = self._args.calm
        self._show(f"{trial.name}: learned for {trial.learn()} windows")
        alarms = trial.calm(calm)
        self._show(f"{trial.name}: {calm} benign windows, {alarms} false alarms")
        outcomes = []
        for name in names:
            outcome = trial.attack(name, self._args.windows, self._args.whole, self._args.default_rules)
            outcomes.append(outcome)
            after = outcome["windows_to_alarm"]
            shown = f"alarm after {after}" if after else f"no alarm, {outcome['peak_evidence']:.2f} of one"
            if self._args.default_rules:
                shown += f", by the default rules after {outcome['default_windows_to_alarm'] or 'none'}"
            self._show(f"{trial.name}: {name}: {shown}; {', '.join(outcome['top_features'])}")
        return {"benign_windows": calm, "false_alarms": alarms, "attacks": outcomes}


def run_trial(args: argparse.Namespace, show: Show) -> dict[str, Any]:
    first = next(iter(sorted(Path(args.model).glob("*/model.tflite"))), None) if Path(args.model).is_dir() else None
    with named(first or args.model):
        meta = load_model(read_file(str(first or args.model))).metadata
    if meta is None:
        raise ConfigError(f"{args.model} has no stonechat metadata")
    if meta.schema_id == schemas.LINUX_SERVICE_1.id:
        from stonechat_tools.evaluation import trial_services

        return trial_services.run(args, meta, show)
    schema = next((one for one in (schemas.LINUX_1, schemas.LINUX_PROC_1) if one.id == meta.schema_id), None)
    if schema is None:
        raise ConfigError(f"{args.model} is for {meta.schema_name}, which no Linux device gives")
    box.need_root()
    if args.guests and (args.loopback or schema is schemas.LINUX_1):
        raise ConfigError("--guests is for linux-proc-1, with its peers outside")
    names = _chosen(args.attacks, attacks.ATTACKS, "attack")
    tasks = deal(_chosen(args.kinds or "sensor", benign.KINDS, "kind"), names, args.boxes)
    trials = Trials(args, schema, meta.window_ms, show)
    with ThreadPoolExecutor(args.boxes) as pool:
        try:
            runs = [
                pool.submit(trials.one, f"{kind}-{n + 1}", kind, some, args.seed + n)
                for n, (kind, some) in enumerate(tasks)
            ]
            done = [run.result() for run in runs]
        except BaseException:
            trials.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    outcomes = [outcome for one in done for outcome in one["attacks"]]
    outcomes.sort(key=lambda outcome: names.index(outcome["attack"]))  # and within one, as the devices were asked for
    return {
        "command": "stonechat " + shlex.join(sys.argv[1:]),
        "model": meta.name,
        "window_s": meta.window_ms / 1000,
        "alarm_rules": [[number / 256 for number in rule] for rule in meta.alarm_rules],
        "pace": args.pace,
        "learned_windows": meta.learn_windows,
        "benign_windows": sum(one["benign_windows"] for one in done),
        "false_alarms": sum(one["false_alarms"] for one in done),
        "attacks": outcomes,
    }


def _chosen(text: str | None, known: dict[str, Any], what: str) -> list[str]:
    words = [word for word in text.split(",") if word] if text else list(known)
    if not words:
        raise ConfigError(f"{text!r} names no {what}: there are {', '.join(known)}")
    for word in words:
        if word not in known:
            raise ConfigError(f"{word!r} is no {what}: there are {', '.join(known)}")
    return words


_OUTCOME = {"attack", "device", "windows", "windows_to_alarm", "peak_evidence", "top_features"}


def read_figures(path: str) -> dict[str, Any]:
    """What --json wrote. Raises ConfigError or OSError."""
    figures = read_json(path, "the outcome of a trial")
    wanted = ("model", "command", "window_s", "alarm_rules", "pace", "learned_windows", "benign_windows")
    if not isinstance(figures, dict) or not all(key in figures for key in (*wanted, "false_alarms", "attacks")):
        raise ConfigError(f"{path}: not the outcome of a trial, as --json writes it")
    for outcome in figures["attacks"]:
        if not isinstance(outcome, dict) or not outcome.keys() >= _OUTCOME:
            raise ConfigError(f"{path}: an attack without its outcome")
    return figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        type=shipped.path,
        help="a .tflite for linux-1, linux-proc-1 or linux-service-1, a shipped name, or a folder: a model a service",
    )
    add("--kinds", metavar="A,B", help=f"the devices, of {', '.join(benign.KINDS)} (default sensor); or the services")
    add("--beside", default="linux-1", metavar="MODEL", help="a model of services: the host's own ('': none)")
    add("--attacks", metavar="A,B", help="these only (default: all)")
    add("--boxes", type=int, default=1, metavar="N", help="number of sandboxes that run in parallel (default 1)")
    add("--pace", type=float, default=4.0, help="how much more often rare things happen (default 4)")
    add("--seed", type=int, default=100, help="of the first device's day; the others count up (default 100)")
    add("--guests", action="store_true", help="linux-proc-1: each device a guest under User-mode Linux")
    add("--loopback", action="store_true", help="everything on the device's loopback")
    add("--calm", type=int, default=CALM_WINDOWS, help="benign windows first (default %(default)s)")
    add("--windows", type=int, default=WINDOWS, help="an attack lasts at most (default %(default)s)")
    add("--whole", action="store_true", help="an attack goes on after its alarm, for all its windows: for recordings")
    add(
        "--default-rules",
        type=int,
        default=0,
        metavar="N",
        help="also test the default alarm rules, in at most N windows (default: not tested)",
    )
    add("--traces", metavar="DIR", help="keep the windows, labelled, as traces: for `stonechat evaluate`")
    add("--json", metavar="FILE", help="write the outcome to FILE")
    add("--page", metavar="FILE", help="write it as a page of Markdown")
    add("--benign", nargs="+", metavar="TRACE", help="later benign recordings: their false alarms go on the page, too")
    add("--figures", metavar="FILE", help="run nothing: make the page of an earlier --json")


def run(args: argparse.Namespace) -> int:
    from rich.table import Table

    from stonechat_tools.screen import Screen

    if args.boxes < 1:
        raise ConfigError(f"--boxes {args.boxes}: want at least 1")
    check_writable(args.json)
    check_writable(args.page)
    console = Screen()
    if args.figures is not None:
        figures = read_figures(args.figures)
    else:
        figures = run_trial(args, lambda text: console.print(text, highlight=False))
    table = Table("attack", "device", "alarm after", "peak of the evidence", "explained by")
    for outcome in figures["attacks"]:
        after = outcome["windows_to_alarm"]
        shown = f"{after} window{'s' if after > 1 else ''}" if after else "never"
        peak = f"{outcome['peak_evidence']:.2f}"
        table.add_row(outcome["attack"], outcome["device"], shown, peak, ", ".join(outcome["top_features"]))
    console.print(table)
    print(f"{figures['false_alarms']} false alarms in {figures['benign_windows']} benign windows")
    if args.json:
        write_atomic(args.json, json.dumps(figures, indent=2) + "\n")
    if args.page and "services" in figures:
        from stonechat_tools.evaluation.trial_services import write_page

        write_page(figures, args.page)
    elif args.page:
        benign_figures = None
        if args.benign:
            from stonechat_tools.evaluation.evaluate import evaluate
            from stonechat_tools.traces.files import read_all

            benign_figures = evaluate(read_file(args.model), read_all(args.benign))
        from stonechat_tools.evaluation.trial_page import page

        write_atomic(args.page, page(figures, figures["command"], benign_figures))
    return 0
