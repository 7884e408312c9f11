"""The reference model, the device's own model and both on the same recordings: what `evaluate --personalize` measures.

Each device lives through its benign windows in the agent itself, its loop, state and reports: the reference model
learns, the own model is collected, trained, tried out and adopted, and then both decide. Its attacks are then tried by
an agent that is started anew with that state, without evidence.

Contaminated starts: windows of an attack replace a share of the windows that the own model is trained on, or
of all windows from the first one on. They replace them because they were recorded on that device at its work.
"""

import json
import subprocess
import sys
import time
import tracemalloc
from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from stonechat import own_model
from stonechat.agent import Agent
from stonechat.delivery import Delivery
from stonechat.detection import ALARM
from stonechat.errors import ConfigError, ModelError, StonechatError
from stonechat.model import load_model
from stonechat.outbox_memory import MemoryOutbox
from stonechat.own_model_training import Training
from stonechat.replay import Replay
from stonechat.schema import Schema
from stonechat.state import State

from ..modeling import golden
from ..modeling.provenance import holds_training_windows
from ..traces.format import TraceError, is_benign
from ..traces.trace import Trace

Show = Callable[[str], None]
_LATE = 1.05  # of a window's length: a window that ended later counts as late
_IN_SAMPLE = "The reference model was trained on windows of these recordings: its benign alarms are in-sample, too few."
_RUN = 16  # windows of an attack in a row in a contaminated start


@dataclass
class Row:
    """One window: deltas, its length, and what was going on."""

    deltas: list[int]
    elapsed_ms: int
    label: str


@dataclass
class Life:
    """What a device's benign windows came to. Alarms are counted from the end of the training on."""

    later: int = 0
    alarms: dict[str, int] = field(default_factory=lambda: {"reference": 0, "own": 0, "both": 0})
    phase: str = ""
    refused: int = 0
    adopted_after: int | None = None  # windows
    training_s: float = 0.0
    trimmed: int = 0
    early_alarms: int = 0  # of the reference model, before the end of the training
    unfit: int = 0  # windows that said that the reference model does not fit
    data: bytes = b""


class Device:
    """One device: reference, own model, and the state that they keep."""

    def __init__(self, reference: bytes, schema: Schema, windows: int) -> None:
        self._reference = reference
        self._schema = schema
        self._windows = windows
        self.life = Life()
        self._start(State(None), None)

    def _start(self, state: State, data: bytes | None) -> None:
        self.slot = _Memory(data)

        def make(schema: Schema, reference: Any, state: State) -> own_model.OwnModel:
            return _Own(schema, reference, state, self.slot, self._windows)

        self._row = Row([0] * len(self._schema), 0, "")
        self._replay = Replay(self._schema, self._fed())
        self._clock = iter(self._replay)
        reporter = Delivery("evaluate", bytes(32), MemoryOutbox(), bytes_per_day=0, state=state)
        self.agent = Agent(
            self._replay,
            load_model(self._reference),
            reporter=reporter,
            state=state,
            own=lambda collector, model, state: own_model.OwnChannel(collector, model, state, make),
        )
        self.own: _Own = self.agent.own  # type: ignore[assignment]  # what make() made
        self.scorer = self.agent.channels[0].scorer
        self.agent.end_window(next(self._clock))  # the first reading primes

    def _fed(self) -> Iterator[tuple[int, list[int]]]:
        while True:
            yield self._row.elapsed_ms, self._row.deltas

    def step(self, row: Row) -> dict[str, int]:
        """One window -> the levels; own: 0 while there is none."""
        self._row = row
        both = self.agent.end_window(next(self._clock))
        if self.agent.errors:
            raise StonechatError(f"the agent failed: {self.agent.last_error}")
        own = self.own.scorer.verdict.level if self.own.scorer is not None else 0
        return {"reference": self.own.reference_level, "own": own, "both": both.level if both else 0}

    def live(self, rows: list[Row]) -> Life:
        life = self.life
        before = {"reference": 0, "own": 0, "both": 0}
        for number, row in enumerate(rows):
            levels = self.step(row)
            begun = self.own.phase in (own_model.ON_TRIAL, own_model.DECIDING)
            life.later += begun
            life.unfit += self.scorer.verdict.unfit
            for name, level in levels.items():
                raised = level == ALARM and before[name] != ALARM
                life.alarms[name] += raised and begun
                life.early_alarms += raised and not begun and name == "reference"
            before = levels
            start_s = time.process_time()
            while self.own.work(1000):
                pass
            life.training_s = max(life.training_s, time.process_time() - start_s)
            if self.own.phase == own_model.DECIDING and life.adopted_after is None:
                life.adopted_after = number + 1
        life.phase, life.refused = own_model.STATES[self.own.phase], self.own.refused
        life.data = self.own._data
        return life

    def attacked(self, rows: list[Row]) -> dict[str, int | None]:
        """-> the window of the alarm, by reference, own and both, on a copy of this device without evidence."""
        self.agent.save()
        copied = State(None)
        copied.sections = dict(self.agent.state.sections)
        other = Device(self._reference, self._schema, self._windows)
        other._start(copied, self.slot.content)
        other.scorer.clear_evidence()
        other.own.clear_evidence()
        found: dict[str, int | None] = {"reference": None, "own": None, "both": None}
        for number, row in enumerate(rows, 1):
            for name, level in other.step(row).items():
                if level == ALARM and found[name] is None:
                    found[name] = number
        return found


class _Own(own_model.OwnModel):
    """One that notes what the reference alone would say."""

    reference_level = 0

    def judge(self, window: Any, verdict: Any) -> Any:
        self.reference_level = verdict.level if verdict is not None else 0
        return super().judge(window, verdict)  # type: ignore[no-untyped-call]


class _Memory:
    """A slot that forgets with the process."""

    def __init__(self, content: bytes | None) -> None:
        self.content = content or b""

    def load(self) -> bytes:
        return self.content

    def save(self, content: bytes) -> None:
        self.content = content


def personalize(
    reference: bytes,
    trace: Trace,
    windows: int,
    shares: list[float],
    show: Show,
    most_windows: int = own_model.WINDOWS,
    digests: Collection[str] = (),
) -> dict[str, Any]:
    """reference: a model's file; trace: benign windows and then attacks of each device; windows: how many the own model
    is trained on; shares: of contaminated starts, 1.0 is an infection from the first window on; most_windows: on which
    the cost of a training is measured; digests: the SHA-256 of the trace's files -> the figures. Raises ModelError,
    TraceError, ConfigError."""
    meta = load_model(reference).metadata
    if meta is None or meta.schema_id != trace.schema.id or meta.window_ms != trace.window_ms:
        raise TraceError("the model is for another schema or window than the recordings")
    devices: dict[str, Any] = {}
    rows = {name: _rows(trace.of_device(name)) for name in trace.device_names}
    exact = checked = 0
    for name, every in rows.items():
        count = len(_apart(every)[0])
        if not 0 < windows < count:
            raise ConfigError(
                f"{name}: {count} benign windows are too few for --personalize {windows}: from 1 to {count - 1}"
            )
    for name, every in rows.items():
        show(f"{name}: {len(every)} windows")
        benign, attacks = _apart(every)
        device = Device(reference, trace.schema, windows)
        life = device.live(benign)
        if not life.later:
            raise ConfigError(f"{name}: {len(benign)} benign windows are too few for --personalize {windows}")
        outcomes = [{"attack": label} | device.attacked(part) for label, part in attacks]
        if life.data:
            same = _is_exact(life.data)
            checked += same is not None
            exact += bool(same)
        devices[name] = _shown(life) | {"attacks": outcomes}
    figures: dict[str, Any] = {
        "model": meta.name,
        "window_s": meta.window_ms / 1000,
        "alarm_rules": [[number / 256 for number in rule] for rule in meta.alarm_rules],
        "windows": windows,
        "in_sample": holds_training_windows(reference, trace.select(trace.benign), digests),
        "devices": devices,
        "late_share": float((trace.elapsed_ms > _LATE * trace.window_ms).mean()),
        "exact": exact,
        "checked": checked,
        "full_memory": full_memory(len(trace.schema), most_windows),
        "contaminated": [],
    }
    for share in shares:
        figures["contaminated"].append(_contaminated(reference, trace.schema, rows, windows, share, meta, show))
    return figures


def _shown(life: Life) -> dict[str, Any]:
    return {key: value for key, value in vars(life).items() if key != "data"} | {"file_bytes": len(life.data)}


def _rows(part: Trace) -> list[Row]:
    return [
        Row(deltas, int(elapsed), str(label))
        for deltas, elapsed, label in zip(part.deltas.tolist(), part.elapsed_ms, part.labels, strict=True)
    ]


def _apart(rows: list[Row]) -> tuple[list[Row], list[tuple[str, list[Row]]]]:
    """-> (the benign windows, (label, windows) of each attack in its order)."""
    attacks: list[tuple[str, list[Row]]] = []
    last = ""
    for row in rows:
        if not is_benign(row.label):
            if row.label != last:
                attacks.append((row.label, []))
            attacks[-1][1].append(row)
        last = row.label
    return [row for row in rows if is_benign(row.label)], attacks


def _is_exact(data: bytes) -> bool | None:
    """Does the file give the same bytes in TFLite Micro, tflite-runtime's reference kernels and the agent? None where
    they are not installed."""
    model = load_model(data)
    try:
        vectors = golden.make(data)["vectors"]
    except ModelError as error:
        return None if golden.runtime_missing(error) else False
    return all(bytes(model.run(bytes.fromhex(x))).hex() == y for x, y, _ in vectors)


# -------------------------------------------------------------------------------------------------- contaminated starts


def _contaminated(
    reference: bytes, schema: Schema, rows: dict[str, list[Row]], windows: int, share: float, meta: Any, show: Show
) -> dict[str, Any]:
    outcomes = []
    for name, every in rows.items():
        benign, attacks = _apart(every)
        for label, part in attacks:
            show(f"{name}: {share:.0%} {label}")
            mixed = _mixed(benign, part, share, meta.learn_windows, windows)
            device = Device(reference, schema, windows)
            life = device.live(mixed)
            found = device.attacked(part)
            outcomes.append({"device": name, "attack": label} | found | _shown(life))
    return {"share": share, "attacks": outcomes}


def _mixed(benign: list[Row], attack: list[Row], share: float, learned: int, windows: int) -> list[Row]:
    """The benign windows with an attack's in place of `share` of those that the own model is trained on, in runs of
    _RUN, evenly spread; 1.0: of all windows."""
    mixed = list(benign)
    if share >= 1:
        return [attack[i % len(attack)] for i in range(len(benign))]
    runs = max(1, round(share * windows * 3 / 4 / _RUN))
    left = round(share * windows * 3 / 4)
    for number in range(runs):
        at = learned + round((number + 0.5) * windows * 3 / 4 / runs)
        for i in range(min(_RUN, left) if number < runs - 1 else left):
            mixed[at + i] = attack[i % len(attack)]
        left -= _RUN
    return mixed


# ------------------------------------------------------------------------------------------------------- what it costs


def full_memory(features: int, windows: int) -> dict[str, float]:
    """Train on a full memory of made-up windows in a process of its own -> its processor seconds, longest step in ms
    and the memory that it took, in MB."""
    command = [sys.executable, "-m", __name__, str(features), str(windows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _train_a_full_memory(features: int, windows: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(features // 3, features)) * 50
    values = 2000 + rng.normal(size=(windows, features // 3)) @ mixing + rng.normal(size=(windows, features)) * 80
    rows = array("H", np.rint(values).clip(0, 25600).astype(int).ravel().tolist())
    schema = Schema("full", [(f"c{i}", "1", "rate") for i in range(features)])
    start_s = last_s = time.process_time()
    longest_s = 0.0
    training = Training(rows, schema, 5000, name="own", version=1, alarm_rules=((256, 1024, 1536),))
    for _ in training.steps():
        now_s = time.process_time()
        longest_s, last_s = max(longest_s, now_s - last_s), now_s
    cpu_s = time.process_time() - start_s
    tracemalloc.start()
    again = Training(rows, schema, 5000, name="own", version=1, alarm_rules=((256, 1024, 1536),))
    for _ in again.steps():
        pass
    return {
        "windows": windows,
        "features": features,
        "cpu_s": cpu_s,
        "longest_step_ms": 1000 * longest_s,
        "memory_mb": tracemalloc.get_traced_memory()[1] / (1 << 20),
        "collected_kb": len(rows) * 2 / 1024,
        "file_bytes": len(training.data),
    }


# ----------------------------------------------------------------------------------------------------------- the table


def page(figures: dict[str, Any]) -> list[str]:
    """The figures as lines of Markdown."""
    devices = figures["devices"]
    names = list(dict.fromkeys(outcome["attack"] for one in devices.values() for outcome in one["attacks"]))
    rules = "; ".join("(" + ", ".join(f"{number:g}" for number in rule) + ")" for rule in figures["alarm_rules"])
    lines = [
        f"{figures['model']}, windows of {figures['window_s']:g} s, alarm rules {rules}; own models of "
        f"{figures['windows']} windows each; {figures['late_share']:.2%} of the windows ended more than 5 % late.",
        "",
        "| attack | tried on | reference | own | both | windows to alarm: reference | own | both |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        outcomes = [outcome for one in devices.values() for outcome in one["attacks"] if outcome["attack"] == name]
        lines.append(f"| `{name}` | {len(outcomes)} | " + " | ".join(_counts(outcomes) + _waits(outcomes)) + " |")
    every = [outcome for one in devices.values() for outcome in one["attacks"]]
    lines.append(f"| together | {len(every)} | " + " | ".join(_counts(every) + _waits(every)) + " |")
    later = sum(one["later"] for one in devices.values())
    longest_s = max(one["training_s"] for one in devices.values())
    alarms = {name: sum(one["alarms"][name] for one in devices.values()) for name in ("reference", "own", "both")}
    adopted = sum(one["phase"] == "deciding" for one in devices.values())
    lines += [
        "",
        f"Benign alarms in {later} later windows: reference {alarms['reference']}, own {alarms['own']}, both "
        f"{alarms['both']}. {adopted} of {len(devices)} own models were adopted, "
        f"{sum(one['refused'] for one in devices.values())} refused.",
        *([_IN_SAMPLE] if figures["in_sample"] else []),
        f"{figures['exact']} of {figures['checked']} files give the same bytes in TFLite Micro, tflite-runtime, here."
        if figures["checked"]
        else "Whether the files give the same bytes in TFLite was not measured: its runtimes are not installed.",
        f"The longest training took {longest_s:.2f} s of processor time.",
    ]
    cost = figures["full_memory"]
    lines.append(
        f"A training on {cost['windows']} windows of {cost['features']} features takes {cost['cpu_s']:.1f} s of "
        f"processor time, {cost['longest_step_ms']:.0f} ms in its longest step, and {cost['memory_mb']:.1f} MB beside "
        f"the {cost['collected_kb']:.0f} KB of windows; the file has {cost['file_bytes']} bytes."
    )
    if figures["contaminated"]:
        lines += [
            "",
            "| contaminated start | tried | reference | own | both | reference does not fit | own models adopted | "
            "refused | benign alarms: reference | both |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    for one in figures["contaminated"]:
        tried = one["attacks"]
        infected = one["share"] >= 1
        if infected:  # alarms in the infected windows themselves count as well
            for outcome in tried:
                seen = outcome["early_alarms"] or outcome["alarms"]["reference"]
                outcome["reference"] = outcome["reference"] or (seen and 1) or None
                outcome["both"] = outcome["both"] or outcome["reference"]
        unfit = sum(outcome["unfit"] > 0 and not outcome["reference"] for outcome in tried)
        adopted = sum(outcome["phase"] == "deciding" for outcome in tried)
        refused = sum(outcome["refused"] for outcome in tried)
        what = "infected from the first window" if infected else f"{one['share']:.0%} of the windows"
        alarms = {name: sum(outcome["alarms"][name] for outcome in tried) for name in ("reference", "both")}
        benign = ["-", "-"] if infected else [str(alarms["reference"]), str(alarms["both"])]
        cells = [what, str(len(tried)), *_counts(tried), str(unfit), str(adopted), str(refused), *benign]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _counts(outcomes: list[dict[str, Any]]) -> list[str]:
    return [str(sum(bool(outcome[name]) for outcome in outcomes)) for name in ("reference", "own", "both")]


def _waits(outcomes: list[dict[str, Any]]) -> list[str]:
    """The median windows to the alarm of those that were found."""
    shown = []
    for name in ("reference", "own", "both"):
        waits = [outcome[name] for outcome in outcomes if outcome[name]]
        shown.append(f"{np.median(waits):g}" if waits else "-")
    return shown


if __name__ == "__main__":
    print(json.dumps(_train_a_full_memory(int(sys.argv[1]), int(sys.argv[2]))))
