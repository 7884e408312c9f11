"""The whole suite, in one call."""

from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from stonechat_tools.evaluation.suite import ablations, robustness
from stonechat_tools.evaluation.suite.protocol import (
    Show,
    Subject,
    budgets,
    compare,
    load,
    load_manifest,
    long_enough,
    make_model,
)
from stonechat_tools.modeling.alarm_rules import poisson_bound

_CONTAMINATED_SEEDS = 3
_STATIC = ("budgets", "ramps", "float", "contamination", "explanation", "tried")


def summary_of_alarms(comparison: dict[str, Any]) -> dict[str, dict[str, float]]:
    """All benign windows together, per detector: alarms, device-days, the one-sided 95 % bound per 30 days."""
    totals: dict[str, dict[str, float]] = {}
    for devices in comparison.values():
        for row in devices.values():
            for name, figures in row.items():
                one = totals.setdefault(name, {"alarms": 0.0, "device_days": 0.0, "alarm_days": 0.0})
                one["alarms"] += figures["alarms"]
                one["alarm_days"] += figures["alarm_share"] * figures["device_days"]
                one["device_days"] += figures["device_days"]
    for one in totals.values():
        one["bound_per_30d"] = 30 * poisson_bound(round(one["alarms"])) / one["device_days"]
    return totals


def check_earlier(figures: Any, path: str) -> None:
    """Raises ConfigError where this is not what run_suite() gave."""
    lacking = [key for key in ("comparison", "seeds", *_STATIC) if not isinstance(figures, dict) or key not in figures]
    if lacking or not isinstance(figures["comparison"], dict):
        raise ConfigError(f"{path}: no figures of an earlier suite: {', '.join(lacking) or 'comparison'} is not there")


def run_suite(
    root: Path, seeds: int, show: Show, manifest: Path | None = None, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Everything. root: the folder with the sets; seeds: how many where a seed plays a part. manifest: anybody's
    captures instead, of which what is about particular sets is left out. earlier: figures of a run; all is taken
    over from it that a change of learning on the device can't move (_STATIC, and the peers)."""
    if manifest is not None:  # what is wrong with it is said in one line, before any progress
        return _own_captures(load_manifest(manifest, show), seeds, show)
    show("reading the recordings")
    groups = long_enough(load(root), show)
    pis = groups.get("pi-spectrum", [])
    comparison = compare(groups, seeds, show, earlier and earlier["comparison"])
    return {
        "seeds": earlier["seeds"] if earlier else seeds,
        "earlier": list(_STATIC) if earlier else [],
        "comparison": comparison,
        "alarms": summary_of_alarms(comparison),
        **({key: earlier[key] for key in _STATIC} if earlier else _static(groups, seeds, show)),
        "fresh": robustness.fresh_device([*pis, *groups.get("pi3-malware", [])], show),
        "starts": robustness.starts([*pis, *groups.get("pi3-malware", [])], show),
        "steady": robustness.steady_change(pis, show),
        "steady_attacks": robustness.steady_attacks(pis, show),
        "unseen": robustness.unseen_devices(groups, root, show),
        "models": {one.name: _model_facts(one) for group in groups.values() for one in group},
    }


def _static(groups: dict[str, list[Subject]], seeds: int, show: Show) -> dict[str, Any]:
    pis = groups.get("pi-spectrum", [])
    return {
        "budgets": budgets({name: groups[name] for name in groups if name != "ipcam"}, show),
        "ramps": robustness.ramps(pis, show),
        "float": robustness.against_float(groups),
        "contamination": robustness.contamination(groups, show, min(seeds, _CONTAMINATED_SEEDS)),
        "explanation": robustness.explanation(groups, seeds),
        "tried": ablations.tried([*groups.get("pi3-malware", []), *pis], show),
    }


def _own_captures(groups: dict[str, list[Subject]], seeds: int, show: Show) -> dict[str, Any]:
    if not groups:
        raise ConfigError("the manifest has no device with enough windows")
    comparison = compare(groups, seeds, show)
    return {
        "seeds": seeds,
        "comparison": comparison,
        "alarms": summary_of_alarms(comparison),
        "budgets": budgets(groups, show),
        "ramps": [],
        "float": robustness.against_float(groups),
        "contamination": [],
        "explanation": robustness.explanation(groups, seeds),
        "fresh": [],
        "starts": [],
        "steady": [],
        "steady_attacks": [],
        "unseen": [],
        "tried": [],
        "models": {one.name: _model_facts(one) for group in groups.values() for one in group},
    }


def _model_facts(one: Subject) -> dict[str, Any]:
    model = make_model(one)
    data = model.to_tflite(one.name, 1)
    n, units = model.decoder.shape
    return {"features": n, "units": units, "file_bytes": len(data), "macs": 2 * n * units}
