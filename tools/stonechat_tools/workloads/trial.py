"""A trial by attack: a device in a namespace of its own, a model that watches it, and every attack in turn.

What watches is `stonechat top --json`, so the verdicts are those of the agent. With --loopback all happens on the
device's loopback, as in the demo; else its peers and attackers are across a veth pair. Counters of processor, memory
and disk are the whole machine's: let it rest meanwhile. Needs root; leaves nothing behind.

Examples:
  python -m stonechat_tools.workloads.trial models/linux-1/model.tflite --json trial.json
  python -m stonechat_tools.workloads.trial models/linux-proc-1-demo/model.tflite --loopback --attacks ransom,miner
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from stonechat.errors import ConfigError, StonechatError
from stonechat.linux import schemas
from stonechat.model import load_model

from stonechat_tools.workloads import attacks, benign, netns
from stonechat_tools.workloads.bounds import disk_folder, leave_cleanly_on_signals, stopped

CALM_WINDOWS = 10  # benign windows that are counted for false alarms, before the first attack
WINDOWS = 12  # that an attack may last
REST_WINDOWS = 60  # at most so many after an attack, until the level is normal again
_JOIN = 'echo $$ > "$0" && exec "$@"'


class Watcher:
    """`stonechat top --json` under `prefix`; `window()` waits for the next one."""

    def __init__(self, model: str, cgroup: Path | None, loopback: bool, prefix: tuple[str, ...]) -> None:
        command = [*prefix, sys.executable, "-m", "stonechat_tools.cli", "top", "--json", "--model", model]
        command += ["--cgroup", str(cgroup)] if cgroup else []
        command += ["--interface", "lo"] if loopback else []
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def window(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise StonechatError("the watcher ended: " + self._process.communicate()[1].strip()[-500:])
        window: dict[str, Any] = json.loads(line)
        return window

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def run_trial(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    meta = load_model(Path(args.model).read_bytes()).metadata
    if meta is None:
        raise ConfigError(f"{args.model} has no stonechat metadata")
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(netns.pair())
        group = stack.enter_context(cgroup()) if meta.schema_id == schemas.LINUX_1.id else None
        inside = (*net.device, "sh", "-c", _JOIN, str(group / "cgroup.procs")) if group else net.device
        peers = None if args.loopback else net.peers
        stack.callback(stopped, benign.spawn(args.kind, 24 * 3600, peers, pace=args.pace, prefix=inside))
        watcher = Watcher(args.model, group, args.loopback, net.device)
        stack.callback(watcher.close)
        figures = _calm(watcher, args.calm, console)
        for name in args.attacks.split(",") if args.attacks else attacks.ATTACKS:
            outcome = _attack(watcher, name, args, net, inside)
            figures["attacks"].append(outcome)
            told = f"alarm after {outcome['windows_to_alarm']}" if outcome["alarmed"] else "no alarm"
            console.print(f"{name}: {told}; {', '.join(outcome['top_features'])}")
    return figures


def _calm(watcher: Watcher, windows: int, console: Console) -> dict[str, Any]:
    learned = 0
    while watcher.window()["verdict"]["learning"]:
        learned += 1
    console.print(f"learned for {learned} windows")
    levels = [watcher.window()["verdict"]["level"] for _ in range(windows)]
    alarms = sum(level == "alarm" and before != "alarm" for before, level in zip(["", *levels], levels, strict=False))
    console.print(f"{windows} benign windows, {alarms} false alarms")
    return {"benign_windows": windows, "false_alarms": alarms, "attacks": []}


def _attack(
    watcher: Watcher, name: str, args: argparse.Namespace, net: netns.Pair, inside: tuple[str, ...]
) -> dict[str, Any]:
    at_device = attacks.ATTACKS[name].at_device
    target = None if args.loopback else net.address if at_device else net.network
    prefix = net.outside if at_device and not args.loopback else inside
    process = attacks.spawn(name, 24 * 3600, target, folder=disk_folder(), prefix=prefix)
    outcome: dict[str, Any] = {"name": name, "alarmed": False, "windows_to_alarm": None, "top_features": []}
    peak = 0.0
    try:
        for n in range(1, args.windows + 1):
            verdict = watcher.window()["verdict"]
            if verdict["evidence"] >= peak:
                peak = verdict["evidence"]
                outcome["top_features"] = [told["feature"] for told in verdict["explain"]]
            if verdict["level"] == "alarm":
                outcome |= {"alarmed": True, "windows_to_alarm": n}
                break
    finally:
        stopped(process)
    outcome["peak_evidence"] = peak
    outcome["explained"] = bool(set(outcome["top_features"]) & set(attacks.ATTACKS[name].features))
    for n in range(REST_WINDOWS):
        outcome["windows_to_normal"] = n
        if watcher.window()["verdict"]["evidence"] < 0.05:
            break
    return outcome


@contextlib.contextmanager
def cgroup() -> Iterator[Path]:
    """A cgroup v2 folder that processes can join. Raises ConfigError where none can be made."""
    from stonechat.linux.connections import cgroup_root

    folder = Path(cgroup_root()) / f"stonechat-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from None
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a .tflite for linux-1 or linux-proc-1")
    parser.add_argument("--kind", choices=benign.KINDS, default="sensor", help="the device (default sensor)")
    parser.add_argument("--pace", type=float, default=4.0, help="how much more often rare things happen (default 4)")
    parser.add_argument("--loopback", action="store_true", help="everything on the device's loopback")
    parser.add_argument("--attacks", metavar="A,B", help="these only (default: all)")
    parser.add_argument("--calm", type=int, default=CALM_WINDOWS, help="benign windows first (default %(default)s)")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="an attack lasts at most (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the outcome to FILE")
    args = parser.parse_args()
    leave_cleanly_on_signals()
    console = Console()
    try:
        figures = run_trial(args, console)
    except (StonechatError, OSError) as error:
        print(f"trial: {error}", file=sys.stderr)
        return 1
    table = Table("attack", "alarm after", "peak of the evidence", "explained by")
    for outcome in figures["attacks"]:
        after = f"{outcome['windows_to_alarm']} windows" if outcome["alarmed"] else "never"
        table.add_row(outcome["name"], after, f"{outcome['peak_evidence']:.2f}", ", ".join(outcome["top_features"]))
    console.print(table)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
