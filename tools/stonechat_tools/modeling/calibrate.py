"""Set a model's alarm constants on a later benign recording, for a budget of false alarms.

The recording must be later than the training and of the same product: constants from the training days do not
extrapolate. Each device in it is replayed as in the field, with learning, drift and evidence, and the fastest alarm
rule that keeps the budget is written into the model. The output states what the recording is long enough to prove: D
silent device-days bound the rate at 3/D a day (95 %). A recording that the model was trained on proves nothing, and the
output says so; no fast rule is earned by it.

--fastest chooses for speed instead: of the rules whose evidence stays well below the threshold on the recording, the
one that alarms soonest over attacks from faint to loud. The recording must be long enough to prove a tenth of the
budget; where no rule stays silent, no model is written.

A budget is alarms per time: 1/30d, 2/7d, 1/12h.

Examples:
  stonechat calibrate models/sensor/model.tflite later.csv.gz --budget 1/30d -o sensor.tflite
  stonechat calibrate model.tflite day1.csv day2.csv --budget 1/1d --json
  stonechat calibrate model.tflite later.csv --fastest -o eager.tflite
  stonechat calibrate model.tflite later.csv --table       # renew the calibration table from the recording too
"""

import argparse
import json
from collections.abc import Collection
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
from stonechat import model_file
from stonechat.errors import ModelError
from stonechat.linux import shipped
from stonechat.metadata import Metadata
from stonechat.model import load_model
from stonechat.own_model_file import seal

from stonechat_tools.console import named, read_file, say, spare_inputs, write_atomic
from stonechat_tools.modeling.alarm_rules import (
    ALARM_RULES,
    FASTEST,
    Budget,
    CalibrationError,
    Choice,
    choose,
    parse_budget,
)
from stonechat_tools.modeling.device_path import Network, Replay, to_features
from stonechat_tools.modeling.fit import table
from stonechat_tools.modeling.options import LATER_WINDOWS, TABLE_WINDOWS
from stonechat_tools.modeling.provenance import digest_file, holds_training_windows
from stonechat_tools.traces.files import read_all
from stonechat_tools.traces.trace import Trace, require_change

Ints = npt.NDArray[np.int64]
TRAINED_ON = "the model was trained on windows of this recording"


def misfit(name: str, windows: int) -> str:
    return (
        f"the model does not fit {name or 'the device'}: it learned again and again in {windows} windows, and never "
        "judges. Train a model on recordings of that device (stonechat train), or leave it out"
    )


def living_streams(meta: Metadata, network: Network, trace: Trace, skip: int = 0) -> list[Ints]:
    """Replay each device's benign windows -> the surprise of those after learning. Raises CalibrationError where the
    model does not fit a device."""
    streams = []
    for name in trace.device_names:
        part = trace.of_device(name)
        f_q8 = to_features(part)
        replay = Replay(meta, network, steady=False)
        result = replay.run(f_q8)
        if replay.misfits and result.learning.all():
            raise CalibrationError(misfit(name, len(part)))
        stream = result.surprise_q8[~result.learning][skip:]
        if len(stream):
            streams.append(stream)
    return streams


def calibrate(
    data: bytes,
    trace: Trace,
    budget: Budget,
    renew_table: bool = False,
    fastest: bool = False,
    digests: Collection[str] = (),
) -> tuple[bytes, Choice]:
    """The model with the alarm constants that the trace and the budget give. digests: the SHA-256 of the trace's files.
    Raises ModelError, CalibrationError."""
    model_file.prove(data)
    meta = load_model(data).metadata
    if meta is None:
        raise ModelError("the model carries no stonechat metadata: make it with `stonechat train`")
    benign = trace.select(trace.benign)
    if meta.schema_id != trace.schema.id or meta.window_ms != trace.window_ms:
        raise CalibrationError(
            f"the model is for {meta.schema_name} in windows of {meta.window_ms} ms, "
            f"the recording holds {trace.schema.name} in windows of {trace.window_ms} ms"
        )
    require_change(benign)
    trained_on = holds_training_windows(data, benign, digests)
    if trained_on and fastest:
        raise CalibrationError(f"{TRAINED_ON}, where it is quieter than ever after: --fastest needs a later recording")
    network = Network.from_file(data)
    if renew_table:
        _renew_table(meta, network, benign)
    streams = living_streams(meta, network, benign)
    if sum(map(len, streams)) < LATER_WINDOWS:
        raise CalibrationError(
            f"{len(benign)} benign windows, of which a device learns in {meta.learn_windows}: "
            f"at least {LATER_WINDOWS} beyond that are needed; record longer"
        )
    rules = [rule for rule in ALARM_RULES if not (trained_on and rule.needs)]
    choice = choose(streams, meta.window_ms, budget, rules, fastest)
    choice.trained_on_known = trained_on is not None
    if trained_on:
        choice.void(f"{TRAINED_ON}. Record the device again, later, and calibrate on that recording")
    if renew_table:
        choice.void("--table made the table from it. Give another recording to `stonechat evaluate`")
    meta.alarm_rules = choice.alarm_rules
    return seal(data, meta), choice


def _renew_table(meta: Metadata, network: Network, benign: Trace) -> None:
    segments = []
    for name in benign.device_names:
        part = benign.of_device(name)
        result = Replay(meta, network, steady=False).run(to_features(part))
        scores = np.sort(result.score_q8[~result.learning])
        if len(scores) >= TABLE_WINDOWS:
            segments.append(scores)
    if not segments:
        raise CalibrationError(f"a table needs at least {TABLE_WINDOWS} windows of one device after its learning")
    meta.knots, meta.tail_q8 = table(segments, len(meta))
    whole = np.sort(np.concatenate(segments))
    meta.location_q8 = int(whole[len(whole) >> 1])
    meta.scale_q8 = max(1, int(whole[len(whole) * 7 >> 3]) - meta.location_q8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=shipped.path, help="the .tflite, or the name of a shipped model")
    add(
        "recordings",
        nargs="+",
        help=f"benign traces later than the training, {LATER_WINDOWS} windows beyond the learning at least",
    )
    add("--budget", default="1/30d", help="false alarms per device and time (default 1/30d)")
    add("--fastest", action="store_true", help="the alarm rule that alarms soonest and stays silent on the recording")
    add("--table", action="store_true", help="renew the calibration table from the recording as well")
    add("-o", "--output", metavar="FILE", help="the .tflite to write (default: change nothing, only report)")
    add("--json", action="store_true", help="print the outcome as JSON")


def run(args: argparse.Namespace) -> int:
    budget = parse_budget(args.budget)
    spare_inputs(args.output, args.recordings)
    with named(args.model):
        trace, digests = read_all(args.recordings), {digest_file(path) for path in args.recordings}
        data, choice = calibrate(read_file(args.model), trace, budget, args.table, args.fastest, digests)
    if args.output:
        write_atomic(args.output, data)
    if args.json:
        print(json.dumps({"model": args.output, **asdict(choice)}))
        return 0
    from rich.table import Table

    from stonechat_tools.screen import Screen

    asked = "keeps the budget" if choice.shows else "earned by its length and peaks"
    asked = "stays silent" if args.fastest else asked
    grid = Table("alarm rule", "fewest windows", "peak / threshold", "alarms a day", asked)
    fewest = {rule.name: rule.windows for rule in (*ALARM_RULES, *FASTEST)}
    for row in choice.tried:
        kept = "yes" if row["kept"] else "no"
        name = row["alarm_rule"]
        grid.add_row(name, str(fewest[name]), f"{row['peak_share']:.2f}", f"{row['per_day']:.3f}", kept)
    Screen().print(grid)
    say(choice.sentence())
    say(f"wrote {args.output}" if args.output else "nothing written: name a file with -o")
    return 0
