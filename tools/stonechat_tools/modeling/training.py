"""From recordings to a model: split by time, fit every candidate, keep the best on validation, set the alarm constants,
measure on what no step has seen. `train.py` is the command around it.

Each device's benign windows are cut in the order of time: 60 % make the network, 20 % the calibration table, the last
20 % are held out, as that device's living stream, for the figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from stonechat import __version__
from stonechat.errors import ConfigError
from stonechat.features import LEVEL, RATE, SHARE

from ..traces.dataset import split
from ..traces.format import TraceError
from ..traces.trace import Trace, join, require_change
from .alarm_rules import choose, parse_budget, poisson_bound
from .calibrate import misfit
from .device_path import to_features
from .fit import FitError, FittedModel, check_file, default_units, fit, set_table
from .options import FRACTIONS, LEAST_WINDOWS, WINDOWS_A_LEARNED_ONE, Options
from .provenance import sample

Ints = npt.NDArray[np.int64]
_INJECTED = 3.0  # deviations: the injected anomalies by which candidates are compared
_INJECTED_FEATURES = (1, 3)
_BUDGET_SHARE = 0.01  # the share of benign windows above the line at which they must be found
_LEAST_QUIET = 20
_ON_THE_CARD_ONLY = ("tried", "held_out")  # a row for each candidate and device: the file goes to devices
_MAX_TABLE_WINDOWS = 20_000
Show = Callable[[str, float], None]
Stream = tuple[Ints, int]  # features of a device's windows, and from which of them on it is judged


@dataclass
class Trained:
    """A model as a file, with everything that its card contains."""

    data: bytes
    fitted: FittedModel
    figures: dict[str, Any]
    provenance: dict[str, Any]


def train(
    traces: Sequence[Trace],
    name: str,
    version: int,
    options: Options,
    show: Show = lambda what, share: None,
    origin: dict[str, str] | None = None,
) -> Trained:
    """traces: of one schema and window; attacks in them are left out. origin: file name -> its SHA-256, for the card.
    Raises TraceError or FitError where they don't suffice, ConfigError for the options."""
    whole = join(list(traces))
    benign = whole.select(whole.benign)
    left_out = _met(benign, options.leave_out)
    benign = benign.select(~left_out)
    if len(benign) < LEAST_WINDOWS:
        raise TraceError(f"{len(benign)} benign windows: training needs at least {LEAST_WINDOWS}; record longer")
    windows = sample(benign)
    require_change(benign)
    borrowed = borrow_quiet(benign, options.busy, options.machine_columns)
    parts = split(benign, FRACTIONS)
    f = _class_features(parts, options.centre_devices)
    fitted, tried = _best(f, whole, options, show)
    show("alarm constants", 0.8)
    fitted.meta.learn_windows = _learnable(options.learn_windows, parts)
    held_out = {device: _living(parts, device) for device in benign.device_names}
    budget = _set_alarm_rules(fitted, held_out, options)
    show("held-out figures", 0.9)
    figures = fitted.figures | held_out_figures(fitted, held_out)
    figures |= {"tried": tried, "budget": budget, "left_out_windows": int(left_out.sum()), "borrowed_windows": borrowed}
    figures |= {"excluded_attack_windows": int((~whole.benign).sum())}
    provenance = {
        "stonechat": __version__,
        "numpy": np.__version__,
        "options": {key: value for key, value in asdict(options).items() if key != "own_model" or not value},
        "recordings": origin or {},
        "windows": windows,
        "devices": {name: int((benign.devices == name).sum()) for name in benign.device_names},
        "notes": whole.notes,
        "backend": options.backend,
    }
    shown = {name: value for name, value in figures.items() if name not in _ON_THE_CARD_ONLY}
    info = {"provenance": cbor_safe(provenance), "figures": cbor_safe(shown)}
    data = fitted.to_tflite(name, version, info, options.own_model)
    figures |= check_file(data, fitted) | {"file_bytes": len(data)}
    show("done", 1.0)
    return Trained(data, fitted, figures, provenance)


def _met(trace: Trace, conditions: Sequence[str]) -> npt.NDArray[np.bool_]:
    """A mask of the windows that meet one of the conditions NAME > NUMBER. Raises ConfigError."""
    met = np.zeros(len(trace), dtype=bool)
    columns = {name: (i, kind) for i, (name, _, kind) in enumerate(trace.schema.columns)}
    for condition in conditions:
        name, _, number = (word.strip() for word in condition.partition(">"))
        try:
            line = float(number)
        except ValueError:
            raise ConfigError(f"leave_out: {condition!r} is not 'NAME > NUMBER'") from None
        if name not in columns:
            raise ConfigError(f"leave_out: {trace.schema.name} has no feature {name!r}")
        i, kind = columns[name]
        met |= trace.deltas[:, i] > line * (256 if kind == SHARE else 1)
    return met


def borrow_quiet(trace: Trace, busy: Sequence[str], columns: Sequence[str]) -> int:
    """In the windows of `trace` that meet a condition of `busy`, replace `columns` by those of a random window that
    meets none, of the same device where it has enough of them -> how many windows that were. Raises ConfigError or
    TraceError."""
    met = _met(trace, busy)
    names = [name for name, _, _ in trace.schema.columns]
    unknown = [name for name in columns if name not in names]
    if unknown:
        raise ConfigError(f"machine_columns: {trace.schema.name} has no feature {unknown[0]!r}")
    at = np.array([names.index(name) for name in columns], dtype=np.int64)
    rng = np.random.default_rng(17)
    all_quiet = np.flatnonzero(~met)
    if met.any() and len(all_quiet) < _LEAST_QUIET:
        raise TraceError(f"only {len(all_quiet)} windows in which the machine was not busy; record longer")
    before = trace.deltas.copy()
    for device in trace.device_names:
        own = trace.devices == device
        quiet, rows = np.flatnonzero(own & ~met), np.flatnonzero(own & met)
        donors = rng.choice(quiet if len(quiet) >= _LEAST_QUIET else all_quiet, len(rows))
        trace.deltas[np.ix_(rows, at)] = before[np.ix_(donors, at)]
    return int(met.sum())


def _class_features(parts: dict[str, Trace], centre_devices: bool) -> dict[str, Ints]:
    f = {part: to_features(trace) for part, trace in parts.items()}
    if centre_devices:
        fit_part = parts["fit"]
        medians = {name: np.median(f["fit"][fit_part.devices == name], axis=0) for name in fit_part.device_names}
        centre = np.mean(list(medians.values()), axis=0)
        for part, trace in parts.items():
            moves = np.array([np.rint(centre - medians[device]) for device in trace.devices.tolist()])
            f[part] = f[part] + moves.astype(np.int64)
    return f


# -------------------------------------------------------------------------------------------------------- candidates


def _best(f: dict[str, Ints], whole: Trace, options: Options, show: Show) -> tuple[FittedModel, list[dict[str, Any]]]:
    """Every candidate fitted -> (the best on validation, what each one reached)."""
    n = len(whole.schema)
    few = default_units(n)
    units = [options.units] if options.units else sorted({max(1, few // 2), max(1, few * 3 // 4), few})
    random = (
        options.jitter_octaves or options.jitter_percent or (options.network, options.backend) != ("linear", "numpy")
    )
    seeds = range(options.seeds if random else 1)  # a closed form without jitter: every seed gives the same
    best: tuple[float, FittedModel] | None = None
    tried: list[dict[str, Any]] = []
    table = f["table"][-_MAX_TABLE_WINDOWS:]
    for number, (unit, seed) in enumerate((unit, seed) for unit in units for seed in seeds):
        show(f"candidate {number + 1} of {len(units) * len(seeds)}", 0.8 * number / (len(units) * len(seeds)))
        model = _fit(jitter(f["fit"], whole.schema, options, seed), table, whole, min(unit, n), seed, options)
        if options.latent_range and options.backend == "numpy":
            model.layers[0].output_scale = options.latent_range / 127
        if random or options.latent_range:  # the table is that of the windows as they were recorded
            set_table(model, [f["fit"], table])
        found = injected_recall(model, table)
        tried.append({"units": unit, "seed": seed, "injected_found": round(found, 4)})
        if best is None or found > best[0] + 1e-9:
            best = (found, model)
    if best is None:
        raise FitError("no candidate could be fitted")
    return best[1], tried


def _fit(f_q8: Ints, table: Ints, whole: Trace, units: int, seed: int, options: Options) -> FittedModel:
    if options.backend == "keras":
        from .keras_backend import fit_keras

        return fit_keras(f_q8, whole.schema, whole.window_ms, table, seed, units)
    return fit(
        f_q8,
        whole.schema,
        whole.window_ms,
        calibration=table,
        seed=seed,
        units=units,
        network=options.network,
        trim=options.trim,
    )


def jitter(f_q8: Ints, schema: Any, options: Options, seed: int) -> Ints:
    """f_q8 with noise of the options' size, the same for the same seed; the input itself where there is none."""
    if not options.jitters:
        return f_q8
    names = [name for name, _, _ in schema.columns]
    unknown = [name for name, _ in options.jitter_of if name not in names]
    if unknown:
        raise ConfigError(f"jitter_of: {schema.name} has no feature {unknown[0]!r}")
    size = {RATE: options.jitter_octaves, LEVEL: options.jitter_octaves, SHARE: options.jitter_percent}
    special = dict(options.jitter_of)
    size_q8 = np.array([256 * special.get(name, size[kind]) for name, _, kind in schema.columns])
    rng = np.random.default_rng(1000 + seed)
    noisy: Ints = np.rint(f_q8 + rng.normal(0.0, 1.0, f_q8.shape) * size_q8).astype(np.int64)
    return noisy


def injected_recall(model: FittedModel, f_q8: Ints, seed: int = 5) -> float:
    """The share of made-up anomalies (one or three features moved by three deviations) whose score lies above 99 % of
    the benign ones: what candidates are compared by, since the benign alone say nothing of detection."""
    replay = model.replay()
    x = replay.inputs(f_q8)
    line = np.quantile(replay.scores(x), 1 - _BUDGET_SHARE)
    rng = np.random.default_rng(seed)
    found = []
    for count in _INJECTED_FEATURES:
        moved = x.copy()
        for _ in range(count):
            columns = rng.integers(0, x.shape[1], len(x))
            signs = rng.choice([-1, 1], len(x))
            moved[np.arange(len(x)), columns] += (signs * _INJECTED * 16).astype(np.int64)
        found.append(float((replay.scores(np.clip(moved, -128, 127)) > line).mean()))
    return float(np.mean(found))


# ------------------------------------------------------------------------------------------- alarm constants, figures


def _living(parts: dict[str, Trace], device: str) -> Stream:
    """One device's last two parts as a stream: it learns in what the table was made from, and is judged after that."""
    table = parts["table"].of_device(device)
    return to_features(join([table, parts["held-out"].of_device(device)])), len(table)


def _learnable(wanted: int, parts: dict[str, Trace]) -> int:
    """Raises FitError where the shortest device's table part is too short to learn in, for then nothing is judged."""
    lengths = {name: len(parts["table"].of_device(name)) for name in parts["table"].device_names}
    shortest = min(lengths, key=lambda name: lengths[name])
    if wanted > lengths[shortest]:
        windows = sum(len(part.of_device(shortest)) for part in parts.values())
        raise FitError(
            f"{windows} benign windows of {shortest or 'the device'}: to learn in {wanted} (learn_windows) it needs at "
            f"least {WINDOWS_A_LEARNED_ONE * wanted}; record longer, or lower learn_windows"
        )
    return wanted


def _set_alarm_rules(fitted: FittedModel, held_out: dict[str, Stream], options: Options) -> str:
    """The alarm constants: those given, or those that the budget and the held-out streams allow -> a sentence."""
    if options.alarm_rules:
        fitted.meta.alarm_rules = tuple(
            (round(k * 256), round(c * 256), round(a * 256)) for k, c, a in options.alarm_rules
        )
        return "set by hand; no false-alarm budget is claimed"
    budget = parse_budget(options.budget)
    streams = [fitted.replay(learn=True).run(f_q8).surprise_q8[start:] for f_q8, start in held_out.values()]
    choice = choose(streams, fitted.window_ms, budget)
    fitted.meta.alarm_rules = choice.alarm_rules
    return f"for the budget {options.budget}: {choice.sentence()}"


def held_out_figures(fitted: FittedModel, held_out: dict[str, Stream]) -> dict[str, Any]:
    """Each device lives through its stream: learning, drift, alarm logic; judged in the held-out part."""
    devices: dict[str, Any] = {}
    for device, (f_q8, start) in held_out.items():
        result = fitted.replay(learn=True).run(f_q8)
        judged = ~result.learning[start:]
        if not judged.any():
            raise FitError(misfit(device, len(result)))
        devices[device] = {
            "windows": int(judged.sum()),
            "alarms": sum(1 for at in result.alarms if at >= start),
            "p_below_01": round(float((result.surprise_q8[start:][judged] >= 512).mean()), 4),
            "evidence_peak": round(float(result.evidence_q8[start:].max()) / 256, 3),
        }
    alarms = sum(row["alarms"] for row in devices.values())
    windows = sum(row["windows"] for row in devices.values())
    days = windows * fitted.window_ms / 86_400_000
    return {
        "held_out": devices,
        "held_out_windows": windows,
        "held_out_device_days": round(days, 4),
        "held_out_alarms": alarms,
        "alarms_per_30_days_at_most_95": round(poisson_bound(alarms) / days * 30, 1),
    }


def cbor_safe(value: Any) -> Any:
    """value with floats as text, for the tools' buffer (deterministic CBOR as stonechat speaks it has no floats)."""
    if isinstance(value, dict):
        return {str(key): cbor_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cbor_safe(item) for item in value]
    return repr(value) if isinstance(value, float) else value
