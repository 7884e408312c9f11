"""`stonechat trial` of a model of services: a busy host of eight, attacks inside of one of them, every channel as the
agent makes it. The host's own channel, with a model of linux-1 of the same window length, watches beside them."""

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from stonechat.compat import ticks_ms
from stonechat.errors import ConfigError, StonechatError
from stonechat.fusion import SideChannel, fuse
from stonechat.linux import services as services_of_agent
from stonechat.linux import shipped
from stonechat.linux.collector import LinuxCollector
from stonechat.linux.schemas import LINUX_1
from stonechat.loop import Channel
from stonechat.model import load_model
from stonechat.state import State

from stonechat_tools.console import read_file, write_atomic
from stonechat_tools.lab import attacks, services
from stonechat_tools.lab.bounds import stopped
from stonechat_tools.traces.format import BENIGN, TraceWriter

ATTACKS = ("shell_recon", "miner", "ransom")
SETTLE_WINDOWS = 4
LEARN_TIMES = 3  # learn_windows, after which a trial no longer waits for a channel
_LONGEST_S = 4 * 3600.0


class Watched:
    """The channels of a host: its own, then one for each service. traces: a folder for labelled windows, or None."""

    def __init__(self, host: services.Host, path: str, beside: str, traces: str | None) -> None:
        parent = os.path.dirname(next(iter(host.cgroups.values())))
        self.names = host.names
        self.collector = LinuxCollector(use_bpf=True, cgroup=parent, services=list(host.cgroups.values()))
        models: dict[str, Any] = {}
        for name in self.names:
            file = services_of_agent.model_path(path, name + ".service")
            if file not in models:
                models[file] = load_model(read_file(file))
                meta = models[file].metadata
                meta.alarm_rules = services_of_agent.share_budget(meta.alarm_rules, len(self.names))
        state = State(None)
        self.own = Channel(self.collector, load_model(read_file(beside)), state) if beside else None
        self.channels = [
            SideChannel(each, models[services_of_agent.model_path(path, each.name)], state, each.name)
            for each in self.collector.services
        ]
        self._values = [0] * len(self.collector.schema)
        self._all: list[Any] = [*([self.own] if self.own else []), *self.channels]
        self._writers = []
        if traces is not None:
            os.makedirs(traces, exist_ok=True)
            for name, channel in zip(self.names, self.channels, strict=True):
                path = os.path.join(traces, name + ".csv.gz")
                window_ms = channel.scorer.window_ms
                self._writers.append(TraceWriter(path, channel.collector.schema, window_ms, name))

    def window(self, labels: dict[str, str]) -> tuple[Any, str, bool]:
        """Read and score one window -> (the fused verdict of the services, the name of the one that leads, does the
        host's own channel alarm). labels: service -> attack, for the traces."""
        now_ms = ticks_ms()
        if self.own is None:
            self.collector.read(self._values)
        own = self.own.end_window(now_ms) if self.own is not None else None
        verdicts = [None]
        for i, channel in enumerate(self.channels):
            verdict = channel.end_window(now_ms)
            verdicts.append(verdict)
            if verdict is not None and self._writers:
                label = labels.get(self.names[i], BENIGN)
                self._writers[i].append(time.time(), channel.window.elapsed_ms, label, channel.window.deltas)
        fused = fuse(verdicts) if any(verdicts) else None
        name = self.names[fused.channel - 1] if fused is not None and fused.channel else ""
        return fused, name, own is not None and own.level > 1

    @property
    def learning(self) -> bool:
        return any(channel.scorer.learning for channel in self._all)

    @property
    def still_learning(self) -> list[str]:
        return [channel.name for channel in self.channels if channel.scorer.learning]

    @property
    def own_learn_windows(self) -> int:
        return max(int(channel.scorer.meta.learn_windows) for channel in self._all)

    def columns(self, fused: Any) -> list[str]:
        names = self.channels[fused.channel - 1].collector.schema.columns
        return [names[index][0] for index, _, _ in fused.explain(3)]

    def clear_evidence(self) -> None:
        for channel in self._all:
            channel.scorer.clear_evidence()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        self.collector.close()


class Clock:
    """Windows of one length, without drift."""

    def __init__(self, window_ms: int) -> None:
        self._window_s = window_ms / 1000
        self._next_s = time.monotonic()

    def wait(self) -> None:
        self._next_s = max(self._next_s + self._window_s, time.monotonic() - self._window_s / 2)
        time.sleep(max(0.0, self._next_s - time.monotonic()))


@contextlib.contextmanager
def _attacked(host: services.Host, service: str, name: str) -> Iterator[None]:
    """The attack goes on inside of the service until this is left."""
    prefix = host.inside[service]
    process = attacks.spawn(name, _LONGEST_S, host.net.network, folder=host.folder, prefix=prefix)
    try:
        yield
    finally:
        stopped(process)


def run(args: argparse.Namespace, meta: Any, show: Callable[[str], None]) -> dict[str, Any]:
    """-> figures as those of a trial of devices, a service in place of a device, and for each attack `named` (the alarm
    named the service) and `host_windows` (when the host's own channel alarmed, None for never)."""
    beside = shipped.path(args.beside) if args.beside else ""
    other = load_model(read_file(beside)).metadata if beside else None
    if beside and (other is None or other.schema_id != LINUX_1.id or other.window_ms != meta.window_ms):
        raise ConfigError(f"--beside {args.beside}: want a model of {LINUX_1.name} with windows of {meta.window_ms} ms")
    attacked = _chosen(args.kinds, services.NAMES, "service")
    names = _chosen(args.attacks, ATTACKS if args.attacks is None else tuple(attacks.ATTACKS), "attack")
    outside = [name for name in names if attacks.ATTACKS[name].at_device]
    if outside:
        raise ConfigError(f"--attacks {','.join(outside)}: they come from outside, not from a service")
    with services.host(_LONGEST_S, args.pace, args.seed) as host:
        watched = Watched(host, args.model, beside, args.traces)
        try:
            return _trial(args, host, watched, Clock(meta.window_ms), attacked, names, show) | {
                "command": "stonechat " + shlex.join(sys.argv[1:]),
                "model": meta.name,
                "window_s": meta.window_ms / 1000,
                "alarm_rules": [[number / 256 for number in rule] for rule in meta.alarm_rules],
                "services": len(host.names),
                "beside": other.name if other is not None else "",
                "pace": args.pace,
                "learned_windows": meta.learn_windows,
            }
        finally:
            watched.close()


def _trial(
    args: argparse.Namespace,
    host: services.Host,
    watched: Watched,
    clock: Clock,
    attacked: list[str],
    names: list[str],
    show: Callable[[str], None],
) -> dict[str, Any]:
    false_alarms = host_alarms = calm = waited = 0
    most = LEARN_TIMES * watched.own_learn_windows
    while waited < most and watched.learning or calm < args.calm:
        clock.wait()
        fused, name, host_alarm = watched.window({})
        waited += 1
        if waited >= most or not watched.learning:
            calm += 1
            false_alarms += fused is not None and fused.level > 1
            host_alarms += host_alarm
    for name in watched.still_learning:
        show(f"{name}: its model does not fit, or it has too few windows; it learns on and can't alarm")
    show(f"learned; {false_alarms} windows in alarm of {calm} benign ones")
    outcomes = []
    for attack in names:
        for service in attacked:
            outcome = _one(args, host, watched, clock, service, attack)
            outcomes.append(outcome)
            after, own = outcome["windows_to_alarm"], outcome["host_windows"]
            show(
                f"{attack} in {service}: {f'alarm after {after} windows' if after else 'no alarm'}"
                f"{'' if outcome['named'] else ', not named'}; the host's own channel: {own or 'none'}; "
                f"{', '.join(outcome['top_features'])}"
            )
    return {
        "benign_windows": calm,
        "false_alarms": false_alarms,
        "host_false_alarms": host_alarms,
        "attacks": outcomes,
    }


def _one(
    args: argparse.Namespace, host: services.Host, watched: Watched, clock: Clock, service: str, attack: str
) -> dict[str, Any]:
    outcome: dict[str, Any] = {"device": service, "attack": attack, "windows_to_alarm": None, "host_windows": None}
    outcome |= {"named": False, "top_features": [], "peak_evidence": 0.0}
    with _attacked(host, service, attack):
        for n in range(1, args.windows + 1):
            clock.wait()
            fused, name, host_alarm = watched.window({service: attack})
            if host_alarm and outcome["host_windows"] is None:
                outcome["host_windows"] = n
            if fused is None:
                continue
            outcome["peak_evidence"] = max(outcome["peak_evidence"], fused.evidence_q8 / 256)
            if fused.level > 1 and outcome["windows_to_alarm"] is None:
                outcome |= {"windows_to_alarm": n, "named": name == service, "top_features": watched.columns(fused)}
            if outcome["windows_to_alarm"] and not args.whole:
                break
    for _ in range(SETTLE_WINDOWS):
        clock.wait()
        watched.window({service: "after"})
    watched.clear_evidence()
    return outcome


def _chosen(text: str | None, known: tuple[str, ...], what: str) -> list[str]:
    words = [word for word in text.split(",") if word] if text else list(known)
    for word in words:
        if word not in known:
            raise ConfigError(f"{word!r} is no {what}: there are {', '.join(known)}")
    return words


def page(figures: dict[str, Any]) -> str:
    """The outcome as Markdown, for trial.md."""
    rules = ", ".join("({:g}, {:g}, {:g})".format(*rule) for rule in figures["alarm_rules"])
    devices = list(dict.fromkeys(outcome["device"] for outcome in figures["attacks"]))
    names = list(dict.fromkeys(outcome["attack"] for outcome in figures["attacks"]))
    by = {(outcome["attack"], outcome["device"]): outcome for outcome in figures["attacks"]}
    lines = [
        f"# {figures['model']}: test by live attacks inside of services",
        "",
        f"Generated by `{figures['command']}`.",
        "",
        f"A host of {figures['services']} services, windows of {figures['window_s']:g} s, alarm rules (allowance, cap, "
        f"threshold) {rules}, the thresholds raised for {figures['services']} services. Each service first learned for "
        f"{figures['learned_windows']} windows; {figures['false_alarms']} windows in alarm among "
        f"{figures['benign_windows']} benign ones before the attacks.",
        "",
        f"| attack | what | {' | '.join(devices)} | features named first |",
        "|---" * (len(devices) + 3) + "|",
    ]
    for name in names:
        cells = [_cell(by.get((name, device))) for device in devices]
        first: list[str] = next((by[name, device]["top_features"] for device in devices if (name, device) in by), [])
        lines.append(f"| `{name}` | {attacks.ATTACKS[name].what} | {' | '.join(cells)} | {', '.join(first)} |")
    right = sum(outcome["named"] for outcome in figures["attacks"])
    own = sum(outcome["host_windows"] is not None for outcome in figures["attacks"])
    lines += [
        "",
        "A number is the window in which the alarm came, counted from the attack's start; a dash says that none came, "
        "with the highest evidence (1 is the threshold). In brackets: when the host's own channel alarmed, with the "
        f"model {figures['beside']}.",
        "",
        f"{right} of {len(figures['attacks'])} alarms named the service that was attacked. The host's own channel "
        f"alarmed in {own} of {len(figures['attacks'])}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return ""
    after = outcome["windows_to_alarm"]
    shown = str(after) if after else f"- ({outcome['peak_evidence']:.2f})"
    if after and not outcome["named"]:
        shown += " (another service named)"
    return f"{shown} ({outcome['host_windows'] or '-'})"


def write_page(figures: dict[str, Any], path: str) -> None:
    if not figures["attacks"]:
        raise StonechatError("no attack was run: there is nothing for a page")
    write_atomic(path, page(figures))
