"""Measure a model on recordings, or the whole method on public captures of real devices.

A model on traces: every device is replayed as in the field, with learning, drift and evidence. Benign windows give the
number of false alarms, the bound that their length allows and the share of time in alarm. For each run of windows with
an attack's label, the windows from its start to the alarm are counted, from a state without evidence: an alarm that was
there before catches nothing. A recording must not begin with an attack, which the device would learn as its normal.
No bound is given for recordings that the model was trained on.

With --personalize the same recordings go through the reference model, the model that each device would train itself
([model] personalize), and both; --contaminated repeats it with a share of attack windows among those it is trained on.

The suite: trains on the benign windows of each set and measures stonechat beside IsolationForest, robust z,
Mahalanobis, KitNET and a float autoencoder on the same windows. Missing sets are left out and listed.

Examples:
  stonechat evaluate models/sensor/model.tflite recordings/later.csv.gz attacks.csv.gz
  stonechat evaluate model.tflite day.csv --json
  stonechat evaluate model.tflite same-device-later.csv --learned
  stonechat evaluate linux-1 own/*.csv.gz --personalize 400 --contaminated 0.05,1
  stonechat evaluate --suite --data ../shared/data --report models/REPORT.md --json suite.json
  stonechat evaluate --suite --data captures/ --seeds 1
  stonechat evaluate --suite --earlier models/report/figures.json --report models/REPORT.md
  stonechat evaluate --manifest my-captures.toml --report my-report.md
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from stonechat.errors import ConfigError, ModelError
from stonechat.linux import shipped
from stonechat.metadata import Metadata
from stonechat.model import load_model

from stonechat_tools.console import (
    check_writable,
    counted,
    named,
    read_file,
    read_json,
    safe,
    say,
    spare_inputs,
    write_atomic,
    write_together,
)
from stonechat_tools.modeling.alarm_rules import DAY_S, poisson_bound
from stonechat_tools.modeling.calibrate import TRAINED_ON, misfit
from stonechat_tools.modeling.device_path import Network, Replay, to_features
from stonechat_tools.modeling.provenance import digest_file, holds_training_windows
from stonechat_tools.traces.files import read_all
from stonechat_tools.traces.format import TraceError, is_benign
from stonechat_tools.traces.trace import Trace, require_change

DEFAULT_DATA = "../shared/data"
SETS = ("pi3-malware", "pi-spectrum", "iot-lan", "iot23", "ipcam")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", type=shipped.path, help="the .tflite, or the name of a shipped model")
    add("traces", nargs="*", help="recordings: benign and labelled attacks")
    add("--learned", action="store_true", help="the devices are those the model was trained on: no learning first")
    add(
        "--personalize",
        nargs="?",
        type=int,
        const=2000,
        metavar="N",
        help="reference, own model and both, each device's own model trained on N windows (default 2000)",
    )
    add(
        "--contaminated",
        default="",
        metavar="SHARES",
        help="with --personalize: attack windows among those, such as 0.02,0.1; 1: infected from the first window on",
    )
    add("--suite", action="store_true", help="the whole method on public captures, beside its peers")
    add("--data", default=DEFAULT_DATA, metavar="DIR", help=f"where the captures are (default {DEFAULT_DATA})")
    add("--manifest", metavar="TOML", help="the suite on your own captures, as this file describes them")
    add(
        "--earlier",
        metavar="JSON",
        help="figures.json of an earlier suite: measure again what learning moves",
    )
    add("--seeds", type=int, default=5, help="how many, where a seed plays a part (default 5)")
    add(
        "--report",
        metavar="FILE",
        help="write the suite's page here; plots and figures.json go to a folder `report` beside it",
    )
    add("--json", nargs="?", const="-", metavar="FILE", help="write the figures as JSON (to the screen without FILE)")


def run(args: argparse.Namespace) -> int:
    _check_options(args)
    check_writable(args.report)
    check_writable(None if args.json == "-" else args.json)
    if args.suite or args.manifest is not None:
        return _suite(args)
    if not args.model or not args.traces:
        raise ConfigError("name a model and at least one trace, or --suite")
    if args.personalize is not None:
        return _personalize(args)
    spare_inputs(args.json, [args.model, *args.traces])
    with named(args.model):
        digests = {digest_file(path) for path in args.traces}
        figures = evaluate(read_file(args.model), read_all(args.traces), not args.learned, digests)
    if args.json:
        _write_json(figures, args.json)
    if args.json != "-":
        _print(figures)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for an option that would change nothing beside the others."""
    suite = args.suite or args.manifest is not None
    for_suite = {"--report": args.report, "--earlier": args.earlier}
    for_model = {
        "a model": args.model,
        "--learned": args.learned,
        "--personalize": args.personalize is not None,
        "--contaminated": args.contaminated,
    }
    for name, given in (for_model if suite else for_suite).items():
        if given:
            raise ConfigError(f"{name} is {'not ' if suite else ''}for --suite and --manifest")
    if args.contaminated and args.personalize is None:
        raise ConfigError("--contaminated is for --personalize")
    if args.learned and args.personalize is not None:
        raise ConfigError("--learned is not for --personalize: there every device learns first")


def _personalize(args: argparse.Namespace) -> int:
    from rich.console import Console

    from stonechat_tools.evaluation.personalize import page, personalize

    try:
        shares = [float(word) for word in args.contaminated.split(",") if word]
    except ValueError:
        shares = [0.0]
    if any(not 0 < share <= 1 for share in shares):
        raise ConfigError(f"--contaminated {args.contaminated}: want shares above 0, at most 1, with commas")
    spare_inputs(args.json, [args.model, *args.traces])
    with _progress(Console(stderr=True)) as show:
        digests = {digest_file(path) for path in args.traces}
        trace = read_all(args.traces)
        figures = personalize(read_file(args.model), trace, args.personalize, shares, show, digests=digests)
    if args.json:
        _write_json(figures, args.json)
    if args.json != "-":
        say("\n".join(page(figures)))
    return 0


# -------------------------------------------------------------------------------------------------- a model on traces


def evaluate(data: bytes, trace: Trace, learn: bool = True, digests: Collection[str] = ()) -> dict[str, Any]:
    """A model's figures on a trace: per device and together. learn=False: the devices are those that the model was
    trained on, and need not learn their own normal first. digests: the SHA-256 of the trace's files. in_sample: whether
    the model was trained on windows of the trace, None where it does not say. Raises ModelError, TraceError."""
    meta = load_model(data).metadata
    if meta is None:
        raise ModelError("the model carries no stonechat metadata: make it with `stonechat train`")
    if meta.schema_id != trace.schema.id or meta.window_ms != trace.window_ms:
        raise TraceError(
            f"the model is for {meta.schema_name} in windows of {meta.window_ms} ms, "
            f"the recording holds {trace.schema.name} in windows of {trace.window_ms} ms"
        )
    require_change(trace.select(trace.benign))
    network = Network.from_file(data)
    devices = {name: _device(meta, network, trace.of_device(name), learn) for name in trace.device_names}
    windows = sum(one["benign_windows"] for one in devices.values())
    alarms = sum(one["false_alarms"] for one in devices.values())
    days = windows * meta.window_ms / 1000 / DAY_S
    in_sample = holds_training_windows(data, trace.select(trace.benign), digests)
    for name, one in devices.items():
        if one["misfits"] and not one["benign_windows"] and not one["attacks"]:
            raise TraceError(misfit(name, one["learning_windows"]))
    if not windows and not any(one["attacks"] for one in devices.values()):
        raise TraceError(
            f"no window is left to judge: {len(trace)} windows of {len(devices)} devices, and each learns its normal "
            f"in the first {meta.learn_windows if learn else 0}; record longer, or give --learned if the model was "
            "trained on these devices"
        )
    return {
        "model": meta.name,
        "devices": devices,
        "benign_windows": windows,
        "device_days": days,
        "false_alarms": alarms,
        "alarm_share": sum(one["alarm_windows"] for one in devices.values()) / windows if windows else None,
        "in_sample": in_sample,
        "false_alarms_per_30d_at_most": 30 * poisson_bound(alarms) / days if days and not in_sample else None,
    }


def _device(meta: Metadata, network: Network, part: Trace, learn: bool) -> dict[str, Any]:
    """Benign windows take the living state further; each run of attack windows is tried on a copy of it without
    evidence: an attack that was caught is cleaned up and does not count against the benign windows after it, and a
    false alarm before it is not its discovery."""
    f_q8 = to_features(part)
    replay = Replay(meta, network, learn)
    benign_scores: list[int] = []
    benign_windows = false_alarms = learning = 0
    strange = in_alarm = 0
    attacks: dict[str, list[dict[str, Any]]] = {}
    for start, stop in _runs(part.labels.tolist()):
        label = part.labels[start]
        if is_benign(label):
            result = replay.run(f_q8[start:stop])
            judged = ~result.learning
            benign_windows += int(judged.sum())
            learning += int((~judged).sum())
            false_alarms += len(result.alarms)
            in_alarm += result.alarm_windows
            strange += int((result.surprise_q8[judged] >= 512).sum())
            benign_scores += result.score_q8[judged].tolist()
        else:
            if replay.misfits and replay.seen < meta.learn_windows:
                raise TraceError(misfit(part.devices[start], start))
            if replay.seen < meta.learn_windows:
                raise TraceError(
                    f"device {part.devices[start] or 'without a name'}: {label} comes after {replay.seen} of the "
                    f"{meta.learn_windows} windows in which it learns its normal. Put the device's benign windows "
                    "first (stonechat dataset append BENIGN ATTACK), or give --learned if the model was trained on it"
                )
            result = replay.calm(steady=False).run(f_q8[start:stop])
            row = {
                "windows": stop - start,
                "windows_to_alarm": result.alarms[0] + 1 if result.alarms else None,
                "alarm_share": result.alarm_windows / (stop - start),
                "recall_p01": float((result.surprise_q8 >= 512).mean()),
                "scores": result.score_q8,
            }
            attacks.setdefault(str(label), []).append(row)
    out: dict[str, Any] = {
        "learning_windows": learning,
        "misfits": replay.misfits,
        "benign_windows": benign_windows,
        "false_alarms": false_alarms,
        "alarm_windows": in_alarm,
        "alarm_share": in_alarm / benign_windows if benign_windows else None,
        "benign_p01": strange / benign_windows if benign_windows else None,
        "attacks": {},
    }
    for label, runs in attacks.items():
        scores = np.concatenate([row.pop("scores") for row in runs])
        out["attacks"][label] = {"runs": runs, "auc": _auc(benign_scores, scores)}
    return out


def _runs(labels: list[str]) -> list[tuple[int, int]]:
    edges = [i for i in range(1, len(labels)) if labels[i] != labels[i - 1]]
    return list(zip([0, *edges], [*edges, len(labels)], strict=True)) if labels else []


def _auc(benign: list[int], attack: Any) -> float | None:
    from stonechat_tools.evaluation.suite.protocol import auc

    return auc(benign, attack) if benign else None


def _print(figures: dict[str, Any]) -> None:
    from rich.table import Table

    from stonechat_tools.screen import Screen

    grid = Table("device", "windows", "AUC", "recall at p < .01", "windows to alarm")
    for name, one in figures["devices"].items():
        share = one["benign_p01"]
        shown = "-" if share is None else f"{share:.3f} (benign)"
        rung = f"{one['false_alarms']} false alarms"
        if one["misfits"]:
            rung += f", the model did not fit {counted(one['misfits'], 'time')} and learned again"
        if one["alarm_windows"]:
            rung += f", {100 * one['alarm_share']:.1f} % of the time in alarm"
        grid.add_row(name, f"{one['benign_windows']} benign", "", shown, rung)
        for label, attack in one["attacks"].items():
            for row in attack["runs"]:
                score = "-" if attack["auc"] is None else f"{attack['auc']:.3f}"
                wait = "never" if row["windows_to_alarm"] is None else str(row["windows_to_alarm"])
                grid.add_row("", f"{row['windows']} {label}", score, f"{row['recall_p01']:.2f}", wait)
    Screen().print(grid)
    bound = figures["false_alarms_per_30d_at_most"]
    proven = "" if bound is None else f": at most {bound:.1f} per 30 days (95 %)"
    if figures["in_sample"]:
        proven = f", in-sample: {TRAINED_ON}, which bounds no rate. Give a recording made after the training"
    share = figures["alarm_share"]
    in_alarm = "" if share is None else f", {100 * share:.2f} % of the time in alarm"
    print(f"{figures['false_alarms']} false alarms in {figures['device_days']:.2f} device-days{in_alarm}{proven}")


# ---------------------------------------------------------------------------------------------------------- the suite


def _suite(args: argparse.Namespace) -> int:
    if not 1 <= args.seeds <= 1000:
        raise ConfigError(f"--seeds {args.seeds}: want 1 to 1000")
    root = Path(args.data)
    there = [name for name in SETS if (root / name).is_dir()]
    if not there and args.manifest is None:
        raise ConfigError(f"{root}: none of {', '.join(SETS)} is there; name the folder of the captures with --data")
    from rich.console import Console

    from stonechat_tools.evaluation.suite import checks, page, plots, protocol, runner

    console = Console(stderr=True)
    for name in SETS:
        if name not in there and args.manifest is None:
            print(f"left out: {root / name} is not there", file=sys.stderr)
    earlier = read_json(args.earlier, "figures of an earlier suite") if args.earlier else None
    if earlier is not None:
        runner.check_earlier(earlier, args.earlier)
    with _progress(console) as show:
        manifest = None if args.manifest is None else Path(args.manifest)
        figures = runner.run_suite(root, args.seeds, show, manifest, earlier)
        if args.report and manifest is None:
            show("plots")
            plots.plots(protocol.load(root), Path(args.report).parent / "report")
    if args.report:
        of = "--suite" if args.manifest is None else f"--manifest {args.manifest}"
        of += f" --earlier {args.earlier}" if earlier else ""
        command = f"stonechat evaluate {of} --seeds {args.seeds} --report {args.report}"
        beside = Path(args.report).parent / "report/figures.json"
        beside.parent.mkdir(parents=True, exist_ok=True)
        compact = json.dumps(page.compact(figures), separators=(",", ":"), default=float) + "\n"
        write_together({args.report: page.page(figures, command), beside: compact})
    if args.json:
        _write_json(figures, args.json)
    if args.json != "-":
        for text, got, met in checks.checks(figures):
            Console().print(
                f"{'[green]yes[/]' if met else '[red]no [/]'} {text}: {got}", highlight=False, soft_wrap=True
            )
    return 0


@contextlib.contextmanager
def _progress(console: Any) -> Iterator[Callable[[str], None]]:
    """One line that changes on a terminal, and lines one below the other elsewhere (a log, a pipe). Lengths and what is
    left out stay to be read on a terminal too."""

    from rich.text import Text

    def lines(what: str) -> None:
        say(what, sys.stderr)

    if not console.is_terminal:
        yield lines
        return
    with console.status("evaluating") as status:

        def show(what: str) -> None:
            if " windows to train" in what or what.startswith("left out"):
                console.print(safe(what), highlight=False, markup=False)
            status.update(Text(safe(what)))

        yield show


def _write_json(figures: dict[str, Any], where: str) -> None:
    text = json.dumps(figures, indent=1, default=float)
    if where == "-":
        print(text)
    else:
        write_atomic(where, text + "\n")
