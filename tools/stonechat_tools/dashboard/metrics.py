"""The fleet for Prometheus, in its text format 0.0.4. No metric has a label for the device: what is about one device is
in the database, and a fleet would be as many series."""

import time

from ..fleet.presence import STATES
from ..fleet.store import Store
from ..fleet.wire import LEVELS
from .view import View

# name: (type, help); the order is that of the page. Labels are in braces behind each sample.
METRICS = {
    "stonechat_devices": ("gauge", "Devices by presence."),
    "stonechat_devices_by_level": ("gauge", "Devices by the level of their newest report."),
    "stonechat_devices_by_class": ("gauge", "Devices by class and level; classes beyond the largest are other."),
    "stonechat_devices_by_model": ("gauge", "Devices by model (first digits of its digest) and level."),
    "stonechat_reports_total": ("counter", "Reports stored, of the devices that are known."),
    "stonechat_reports_lost_total": ("counter", "Reports that devices said their full outbox has dropped."),
    "stonechat_reports_unexplained": ("gauge", "Report numbers that are missing and that no device announced."),
    "stonechat_messages_rejected_total": ("counter", "Messages that were refused, by reason."),
    "stonechat_incidents_open": ("gauge", "Incidents that go on, by kind and severity."),
    "stonechat_collector_heard_seconds": ("gauge", "Seconds since a collector was last connected to its broker."),
    "stonechat_scrape_seconds": ("gauge", "How long this page took to make."),
}


def text_of(store: Store, view: View) -> str:
    """The page. Raises StoreError."""
    began_s = time.monotonic()
    found = view.summary()
    samples: dict[str, list[tuple[dict[str, str], float]]] = {name: [] for name in METRICS}
    samples["stonechat_devices"] = [({"state": state}, found["states"][state]) for state in STATES]
    samples["stonechat_devices_by_level"] = [({"level": level}, found["levels"][level]) for level in LEVELS]
    for label in ("class", "model"):
        counts = found[label]
        samples[f"stonechat_devices_by_{label}"] = [
            ({label: value, "level": level}, counts[value, level])
            for value in sorted({value for value, _ in counts})
            for level in LEVELS
        ]
    samples["stonechat_reports_total"] = [({}, found["reports"])]
    samples["stonechat_reports_lost_total"] = [({}, found["lost"])]
    samples["stonechat_reports_unexplained"] = [({}, found["unexplained"])]
    rejected: dict[str, int] = {}
    for reasons in store.rejections().values():
        for reason, count in reasons.items():
            rejected[reason] = rejected.get(reason, 0) + count
    samples["stonechat_messages_rejected_total"] = [({"reason": name}, rejected[name]) for name in sorted(rejected)]
    samples["stonechat_incidents_open"] = [
        ({"kind": kind, "severity": severity}, count) for (kind, severity), count in sorted(found["open"].items())
    ]
    if found["listening"] is not None:
        ago_s = max(0.0, time.time() - found["listening"][1])
        samples["stonechat_collector_heard_seconds"] = [({}, round(ago_s, 1))]
    samples["stonechat_scrape_seconds"] = [({}, round(time.monotonic() - began_s, 6))]
    lines = []
    for name, (kind, text) in METRICS.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        for labels, value in samples[name]:
            inside = ",".join(f'{label}="{_escaped(each)}"' for label, each in labels.items())
            lines.append(f"{name}{'{' + inside + '}' if inside else ''} {value}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
