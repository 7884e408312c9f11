"""Further measurements: ramps, int8 against float, contamination, explanation, fresh and unseen
devices. Each trial gives rows for the report."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stonechat_tools.evaluation.suite import baselines, captures
from stonechat_tools.evaluation.suite.protocol import Show, Subject, auc, first_alarm, make_model
from stonechat_tools.modeling.device_path import EXCESS_MAX, Replay, to_features
from stonechat_tools.modeling.fit import STEP, FittedModel, fit

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_AFTER_START = 4 * 128  # windows of the session behind the last of several starts
_ATTACK_WINDOWS = 400  # of each attack, from each start
_FEATURES = 4  # raised for good, one after the other
_PATIENCE = 8  # hours of one attack


def ramps(subjects: Sequence[Subject], show: Show, lengths: Sequence[int] = (1000, 4000)) -> list[dict[str, Any]]:
    """Each attack grows from nothing to its full strength over N windows of a later benign stream, and stays."""
    rows = []
    for one in subjects:
        model = make_model(one)
        replay = model.replay()
        replay.run(one.table)
        replay.run(one.rest)
        base = one.later[0] if one.later else one.rest
        for name, attack in one.attacks.items():
            show(f"ramp: {one.name} {name}")
            row: dict[str, Any] = {"device": one.name, "attack": name}
            for length in lengths:
                strength = np.minimum(1.0, np.arange(length + 200) / length)
                row[str(length)] = first_alarm(replay.calm().run(_mixed(base, attack, strength)))
            row["largest_unseen"] = _largest_unseen(replay.calm(), base, attack)
            rows.append(row)
    return rows


def _mixed(base: Ints, attack: Ints, strength: Floats) -> Ints:
    """strength 0: the benign windows, 1: the attack's; between them on the line, feature by feature in the log."""
    n = len(strength)
    b, a = base[np.arange(n) % len(base)], attack[np.arange(n) % len(attack)]
    out: Ints = np.rint(b + strength[:, None] * (a - b)).astype(np.int64)
    return out


def _largest_unseen(replay: Replay, base: Ints, attack: Ints, length: int = 2000) -> float:
    """The greatest share of an attack (of eighths) that can be approached over `length` windows, kept as long again
    and never alarm: it is inside the adaptation's bound."""
    low = 0
    for eighth in range(1, 9):
        strength = np.minimum(1.0, np.arange(2 * length) / length) * eighth / 8
        if replay.fork().run(_mixed(base, attack, strength)).alarms:
            break
        low = eighth
    return low / 8


def against_float(groups: dict[str, list[Subject]]) -> list[dict[str, Any]]:
    """The int8 path and its own float: the same weights and centres, nothing rounded, the same clipping at 8 and the
    excess over the limit."""
    rows = []
    for group in ("pi3-malware", "pi-spectrum"):
        for one in groups.get(group, []):
            model = make_model(one)
            still = model.replay()
            benign = _both(model, still, one.test)
            for name, f_q8 in one.attacks.items():
                attack = _both(model, still, f_q8)
                values = [auc(benign[i], attack[i]) for i in range(2)]
                rows.append({"device": one.name, "attack": name, "int8": values[0], "float": values[1]})
    return rows


def _both(model: FittedModel, still: Replay, f_q8: Ints) -> tuple[Floats, Floats]:
    quantized = still.scores(still.steps(f_q8)).astype(np.float64)
    norm = still.normalization
    scale = np.array(norm.inv) / np.exp2(np.array(list(norm.shift))) * STEP
    steps = (f_q8 - np.array(norm.centre_q8)) * scale
    limit = np.array(norm.limit) * STEP
    excess = np.clip(steps - np.clip(steps, -limit, limit), -EXCESS_MAX * STEP, EXCESS_MAX * STEP)
    x = np.clip(steps, -8, 8)
    rebuilt = np.clip(x @ model.encoder.T, -8, 8) @ model.decoder.T
    residual = (x - np.clip(rebuilt, -8, 8) + excess) / model.residual_deviation
    return quantized, (residual**2).sum(axis=1)


def contamination(groups: dict[str, list[Subject]], show: Show, seeds: int) -> list[dict[str, Any]]:
    """A share of the training windows replaced by a run of an attack's, with and without block trimming: the AUC on
    that attack's other windows. 2 % and, with trimming alone, 5 %, or what half the attack's recording gives."""
    rows = []
    for group in ("pi3-malware", "pi-spectrum"):
        for one in groups.get(group, []):
            clean, cut = make_model(one).replay(), make_model(one, trim=0.1).replay()
            for name, attack in one.attacks.items():
                show(f"contamination: {one.name} {name}")
                row: dict[str, Any] = {"device": one.name, "attack": name}
                for key, trim, share in (("untrimmed", 0.0, 0.02), ("trimmed", 0.1, 0.02), ("trimmed_more", 0.1, 0.05)):
                    count = min(math.ceil(share * len(one.train)), len(attack) // 2)
                    kept = attack[count:]
                    values = [_still_auc(_dirty(one, attack[:count], seed, trim), one, kept) for seed in range(seeds)]
                    row[key] = float(np.median(values))
                    row[key + "_clean"] = _still_auc(cut if trim else clean, one, kept)
                    row[key + "_share"] = count / len(one.train)
                row["clean"] = row["untrimmed_clean"]
                rows.append(row)
    return rows


def _dirty(one: Subject, run: Ints, seed: int, trim: float) -> Replay:
    """A model of training windows of which a stretch is the run's."""
    start = int(np.random.default_rng(seed).integers(0, len(one.train) - len(run)))
    dirty = one.train.copy()
    dirty[start : start + len(run)] = run
    return make_model(one, dirty, trim=trim).replay()


def _still_auc(replay: Replay, one: Subject, attack: Ints) -> float:
    return auc(replay.scores(replay.steps(one.test)), replay.scores(replay.steps(attack)))


def explanation(groups: dict[str, list[Subject]], seeds: int, deviations: float = 4.0) -> list[dict[str, Any]]:
    """One feature of an ordinary benign window (not among the strangest twentieth, which has causes of its own) is
    moved, upwards where it can't go below zero: how often is it among the first three of the explanation? Beside
    it what Mahalanobis's distance in floats would name, which knows every covariance: where it fails as well, other
    features of the benign windows are more unusual."""
    rows = []
    for group in ("pi3-malware", "pi-spectrum", "iot-lan"):
        for one in groups.get(group, []):
            replay = make_model(one).replay()
            rival = baselines.Mahalanobis()
            rival.fit(one.train / 256)
            scores = replay.scores(replay.steps(one.test))
            ordinary = one.test[scores <= np.quantile(scores, 0.95)]
            move = np.rint(deviations * replay.deviation_q8).astype(np.int64)
            found: list[list[float]] = []
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                picked = ordinary[rng.integers(0, len(ordinary), 1000)].copy()
                at, column = np.arange(len(picked)), rng.integers(0, picked.shape[1], len(picked))
                down = (rng.random(len(picked)) < 0.5) & (picked[at, column] >= move[column])
                picked[at, column] += np.where(down, -move[column], move[column])
                parts = (replay.parts(replay.steps(picked)), rival.contributions(picked / 256))
                found.append([float(((p > p[at, column][:, None]).sum(axis=1) < 3).mean()) for p in parts])
            own, other = np.median(np.array(found), axis=0).tolist()
            rows.append({"group": group, "device": one.name, "top_three": own, "mahalanobis": other})
    return rows


def fresh_device(subjects: Sequence[Subject], show: Show, learn_windows: int = 128) -> list[dict[str, Any]]:
    """A device that begins its life in the later session with the model of the first: it learns, then watches."""
    rows = []
    for one in subjects:
        show(f"fresh device: {one.name}")
        model = make_model(one, learn_windows=learn_windows)
        replay = model.replay(learn=True)
        stream = one.later[0] if one.later else np.concatenate([one.table, one.rest])
        result = replay.run(stream)
        rows.append(
            {
                "device": one.name,
                "learn_windows": learn_windows,
                "alarms": len(result.alarms),
                "device_days": one.days(int((~result.learning).sum())),
                "attacks": {name: first_alarm(replay.calm().run(f_q8)) for name, f_q8 in one.attacks.items()},
            }
        )
    return rows


def starts(subjects: Sequence[Subject], show: Show, count: int = 12, learn_windows: int = 128) -> list[dict[str, Any]]:
    """The same device that begins its life at `count` times of its later session (of all its windows where it has one
    session): what it learns each time, and the windows to the alarm of each attack from there."""
    rows = []
    for one in subjects:
        show(f"{count} starts: {one.name}")
        model = make_model(one, learn_windows=learn_windows)
        stream = one.later[0] if one.later else np.concatenate([one.train, one.table, one.rest])
        row: dict[str, Any] = {"device": one.name, "scale": [], "location": [], "learned": [], "attacks": {}}
        for start in np.linspace(0, len(stream) - _AFTER_START, count).astype(int).tolist():
            replay = model.replay(learn=True)
            while replay.seen < learn_windows and start < len(stream):
                start += learn_windows
                replay.run(stream[start - learn_windows : start])
            row["scale"].append(replay.scale / model.meta.scale_q8)
            row["location"].append((replay.location - model.meta.location_q8) / 256)
            row["learned"].append(float(np.abs(replay.learned / replay.deviation_q8).max()))
            for name, f_q8 in one.attacks.items():
                wait = first_alarm(replay.calm().run(f_q8[:_ATTACK_WINDOWS]))
                row["attacks"].setdefault(name, []).append(wait)
        rows.append(row)
    return rows


def steady_change(subjects: Sequence[Subject], show: Show) -> list[dict[str, Any]]:
    """The later session, which begins days after the first one, with one feature raised by three deviations for good:
    alarms, time in alarm, and the windows to the alarm of each attack on top of it, beside those without the change."""
    rows = []
    for one in subjects:
        if not one.later:
            continue
        model = make_model(one)
        replay = model.replay()
        replay.run(one.table)
        replay.run(one.rest)
        plain = replay.fork()
        plain.run(one.later[0])
        without = _waits(plain, one.attacks)
        n = len(model.meta)
        for feature in range(0, n, max(1, n // _FEATURES)):
            show(f"steady change: {one.name} {one.schema.columns[feature][0]}")
            raised = np.zeros(n, dtype=np.int64)
            raised[feature] = 3 * replay.deviation_q8[feature]
            changed = replay.calm()
            result = changed.run(one.later[0] + raised)
            rows.append(
                {
                    "device": one.name,
                    "feature": one.schema.columns[feature][0],
                    "windows": len(result),
                    "alarms": len(result.alarms),
                    "alarm_share": result.alarm_windows / len(result),
                    "steady_share": float(result.steady.mean()),
                    "steady_after": int(np.argmax(result.steady)) if result.steady.any() else None,
                    "without": without,
                    "on_top": _waits(changed, {name: f_q8 + raised for name, f_q8 in one.attacks.items()}),
                }
            )
    return rows


def steady_attacks(subjects: Sequence[Subject], show: Show) -> list[dict[str, Any]]:
    """What an attacker gains by the state: each attack, over and over, until it is steady; then each other attack, in
    its place, from there."""
    rows = []
    for one in subjects:
        model = make_model(one)
        replay = model.replay()
        replay.run(one.table)
        replay.run(one.rest)
        for name, f_q8 in one.attacks.items():
            show(f"steady attack: {one.name} {name}")
            living = replay.calm()
            assert living.second
            again = f_q8[np.arange(_PATIENCE * living.second.stated) % len(f_q8)]
            result = living.run(again)
            others = {other: rest for other, rest in one.attacks.items() if other != name}
            rows.append(
                {
                    "device": one.name,
                    "attack": name,
                    "windows_to_alarm": first_alarm(result),
                    "steady_after": int(np.argmax(result.steady)) if result.steady.any() else None,
                    "others": _waits(living, others) if result.steady[-1] else None,
                }
            )
    return rows


def _waits(replay: Replay, attacks: dict[str, Ints]) -> dict[str, int | None]:
    return {name: first_alarm(replay.calm().run(f_q8[:_ATTACK_WINDOWS])) for name, f_q8 in attacks.items()}


def unseen_devices(
    groups: dict[str, list[Subject]], root: Path, show: Show, learn_windows: int = 128
) -> list[dict[str, Any]]:
    """One model for a class of devices, fitted on all home devices but one, on the one left out: it learns its own
    normal, then watches its own benign days, and the malware laid over its last fifth. Devices of IoT-23 that were
    infected while recorded begin with the model of all."""
    homes = groups.get("iot-lan", [])
    if len(homes) < 3:
        return []
    rows = []
    for one in homes:
        show(f"unseen device: {one.name}")
        replay = _class_model([other for other in homes if other is not one], learn_windows).replay(learn=True)
        result = replay.run(np.concatenate([one.train, one.table]))
        living = replay.fork()
        rest = living.run(one.rest)
        waits = {name: first_alarm(replay.calm().run(f_q8)) for name, f_q8 in one.attacks.items()}
        watched = int((~result.learning).sum()) + len(rest)
        alarms = len(result.alarms) + len(rest.alarms)
        rows.append({"device": one.name, "alarms": alarms, "device_days": one.days(watched), "attacks": waits})
    for device in captures.iot23(root):
        quiet = len(device.benign[0])
        if device.attacks and quiet >= 32:
            show(f"unseen device: {device.name}")
            replay = _class_model(homes, quiet // 2 * 2).replay(learn=True)
            replay.run(to_features(device.benign[0]))
            waits = {name: first_alarm(replay.calm().run(to_features(trace))) for name, trace in device.attacks.items()}
            rows.append(
                {
                    "device": f"{device.name} (learned {quiet} windows)",
                    "alarms": 0,
                    "device_days": 0.0,
                    "attacks": waits,
                }
            )
    return rows


def _class_model(homes: Sequence[Subject], learn_windows: int) -> FittedModel:
    train = np.concatenate([one.train for one in homes])
    later = np.concatenate([one.table for one in homes])
    return fit(train, homes[0].schema, homes[0].window_ms, calibration=later, learn_windows=learn_windows)
