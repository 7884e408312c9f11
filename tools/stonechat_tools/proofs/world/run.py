"""A fleet of real agents, brokers and collectors under a seeded schedule of faults; an oracle judges the result.

Needs root and mosquitto. Everything runs in namespaces of its own and ends with this command. A run that failed prints
its seed: the same seed and length give the same schedule.

Examples:
  python -m stonechat_tools.proofs.world --minutes 2
  python -m stonechat_tools.proofs.world --minutes 60 --faults 200 --seed 11 --json world.json
  python -m stonechat_tools.proofs.world --minutes 60 --seed 11 --plan       print the schedule and end
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from stonechat.errors import StonechatError

from stonechat_tools.proofs.world import chaos, oracle, sandbox
from stonechat_tools.proofs.world.devices import Board
from stonechat_tools.proofs.world.faults import Fault
from stonechat_tools.proofs.world.fleet import World

DRAIN_S = 120.0
FOLDER = "STONECHAT_WORLD_FOLDER"


class Progress:
    """One line that is written over on a terminal, a line each half minute elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._said_s = -30.0

    def update(self, done: int, of: int, now_s: float) -> None:
        if not self._terminal and now_s - self._said_s < 30:
            return
        self._said_s = now_s
        end = "\r" if self._terminal else "\n"
        print(f"{now_s:6.0f} s  {done} of {of} faults", end=end, file=sys.stderr, flush=True)


def disturb(world: World, schedule: list[chaos.Entry], say: Progress) -> None:
    """Begin and end each fault of the schedule at its time."""
    began_s = time.monotonic()
    waiting = list(schedule)
    held: list[tuple[float, Fault, float]] = []
    sampled_s = 0.0
    while waiting or held:
        now_s = time.monotonic() - began_s
        for entry in [entry for entry in waiting if entry.at_s <= now_s]:
            waiting.remove(entry)
            fault = chaos.KINDS[entry.kind](world, entry.target)
            world.disturb(fault.cuts(), 1)
            begun_s = time.time()
            _safely(world, fault.begin, entry)
            held.append((time.monotonic() - began_s + entry.lasts_s, fault, begun_s))
        for item in [item for item in held if item[0] <= now_s]:
            held.remove(item)
            _, fault, begun_s = item
            cuts = fault.cuts()
            _safely(world, fault.end, fault)
            world.disturb(cuts, -1)
            for device in fault.harms():
                world.harmed[device.name].append((begun_s, time.time()))
            for device in cuts:
                world.cut[device.name].append((begun_s - 1, time.time() + 30))
        for part in world.parts:
            part.supervise()
        if now_s - sampled_s >= 5:
            sampled_s = now_s
            for part in world.parts:
                world.memory[part.name].append((now_s, part.starts, part.rss_kib()))
        say.update(len(schedule) - len(waiting), len(schedule), now_s)
        time.sleep(0.1)


def _safely(world: World, action: Callable[[], None], what: object) -> None:
    try:
        action()
    except (OSError, StonechatError, subprocess.SubprocessError) as error:
        world.fail(f"{what}: {error}")


def drain(world: World, ended_s: float) -> float:
    """Wait until all reports of events up to ended_s have arrived, two minutes at the most -> seconds waited."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < DRAIN_S:
        for part in world.parts:
            part.supervise()
        time.sleep(2.0)
        if time.monotonic() - began_s > 10 and not _waiting(world, ended_s):
            break
    return time.monotonic() - began_s


def _waiting(world: World, ended_s: float) -> bool:
    """Is a number missing within a stream, or is a device's newest event older than the end of the faults?"""
    for site in world.sites:
        streams, _ = oracle.read_streams(site.collector.database)
        for device in world.devices:
            found = streams.get(device.name, {})
            if device.site is not site or isinstance(device, Board) and device.profile == "core":
                continue
            if max((max(stream.times.values()) for stream in found.values()), default=0) < ended_s:
                return True
            for identity, stream in found.items():
                if any((identity, number) not in world.lost[device.name] for number in stream.missing):
                    return True
    return False


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="world", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--minutes", type=float, default=2.0, help="length of the chaos (default 2)")
    made.add_argument("--faults", type=int, help="how many (default: one each six seconds)")
    made.add_argument("--seed", type=int, help="of the schedule (default: a new one, printed)")
    made.add_argument("--plan", action="store_true", help="print the schedule and end")
    made.add_argument("--keep", metavar="FOLDER", type=Path, help="copy all logs and databases there at the end")
    made.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    return made


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(1, 100_000)
        arguments = [*arguments, "--seed", str(args.seed)]
    if not sandbox.is_inside():
        why = why_not()
        if why:
            print(f"world: {why}", file=sys.stderr)
            return 2
        folder = tempfile.mkdtemp(prefix="stonechat-world-")
        os.environ[FOLDER] = folder
        try:
            return sandbox.enter(arguments)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    folder = os.environ[FOLDER]
    os.chmod(folder, 0o755)
    sandbox.mount("-t", "tmpfs", "-o", "size=2g,mode=0755", "tmpfs", folder)
    sandbox.prepare(Path(folder))
    sandbox.drop_packets()
    try:
        return _run(args, Path(folder))
    except (StonechatError, OSError) as error:
        print(f"world: {error} (seed {args.seed})", file=sys.stderr)
        return 1


def soak(scale: float) -> bool:
    """An hour of it, or `scale` hours."""
    return main(["--minutes", str(60 * scale)]) == 0


def why_not() -> str:
    """Why the fleet can't run here; empty: it can."""
    if os.geteuid():
        return "it makes namespaces and mounts: run it as root"
    missing = [name for name in ("mosquitto_pub", "unshare", "nft", "ip") if not shutil.which(name)]
    if not (shutil.which("mosquitto") or os.path.exists("/usr/sbin/mosquitto")):
        missing.append("mosquitto")
    return f"not installed: {', '.join(missing)} (`make setup` as root installs them)" if missing else ""


def _run(args: argparse.Namespace, folder: Path) -> int:
    seconds = args.minutes * 60
    faults = args.faults if args.faults is not None else round(seconds / 6)
    world = World(folder, args.seed)
    schedule = chaos.schedule(world, args.seed, seconds, faults)
    levels = oracle.LevelWatch(world)
    print(f"seed {args.seed}: {len(world.devices) + len(world.victims)} agents, {len(schedule)} faults", flush=True)
    for line in world.left_out:
        print(f"left out: {line}")
    if not world.has_faketime:
        print("left out: clocks (faketime is not installed)")
    if args.plan:
        print(chaos.describe(schedule))
        return 0
    try:
        world.start()
        levels.start()
        began_s = time.time()
        disturb(world, schedule, Progress())
        ended_s = time.time()
        drained_s = drain(world, ended_s)
        world.check_parts()
        verdict = oracle.judge(world, levels, began_s, ended_s)
    finally:
        levels.stopping.set()
        world.stop()
        if args.keep:
            _keep(world, schedule, folder, args.keep)
    verdict.figures |= {
        "faults": len(schedule),
        "seed": args.seed,
        "minutes": args.minutes,
        "drained after, s": round(drained_s),
    }
    kinds: dict[str, int] = {}
    for entry in schedule:
        kinds[entry.kind] = kinds.get(entry.kind, 0) + 1
    verdict.figures["faults by kind"] = dict(sorted(kinds.items()))
    for name, value in verdict.figures.items():
        print(f"{name:52} {value}")
    for failure in verdict.failures[:40]:
        print(f"FAILED: {failure}")
    print(f"{len(verdict.failures)} failures" + (f"; repeat with --seed {args.seed}" if verdict.failures else ""))
    if args.json:
        Path(args.json).write_text(json.dumps({**verdict.figures, "failures": verdict.failures}, indent=1) + "\n")
    return 1 if verdict.failures else 0


def _keep(world: World, schedule: list[chaos.Entry], folder: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for path in folder.rglob("*.log"):
        shutil.copyfile(path, to / path.name)
    (to / "schedule.txt").write_text(chaos.describe(schedule) + "\n")
    for site in world.sites:
        with contextlib.suppress(OSError):
            shutil.copyfile(site.collector.database, to / f"{site.name}.db")
