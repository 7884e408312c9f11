"""The test of alarms halts a staged roll-out to real agents: none of them proves the release on windows of its own, so
none refuses it, and it alarms on what is normal.

That test counts days. So the collector is `stonechat collect` for which a day lasts DAY_S seconds:

    python -m stonechat_tools.proofs.rollout_alarms collect --keys ... --db ...
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from stonechat.errors import ConfigError

from ..fleet import collect, collector, rollout_judge
from ..fleet.local_broker import mosquitto_path
from ..fleet.store import retention
from . import rollout_fleet
from .rollout_fleet import BOARDS, LINUX, WINDOW_MS, World, tool

DAY_S = 6


def main(words: list[str]) -> int:
    rollout_judge.DAY_S = DAY_S  # type: ignore[attr-defined]
    rollout_judge.DAY_LATE_S = DAY_S // 2
    retention.BEHIND_S = 1
    retention._TABLES = (("hourly", 3600), ("daily", DAY_S))
    collector.RETAIN_S, collector.RETAIN_BUSY_S = 1.0, 2.0
    parser = argparse.ArgumentParser()
    collect.add_arguments(parser)
    return int(collect.run(parser.parse_args(words[1:])))


def run_alarms(folder: Path, devices: int, say: Callable[[str], None], window_ms: int = WINDOW_MS) -> list[str]:
    """At least six devices, on Linux -> what failed. Raises ConfigError where a step does not come to its end."""
    collect_by = [sys.executable, "-m", "stonechat_tools.proofs.rollout_alarms"]
    world = World(folder, devices, 0, say, window_ms, "50%:600s,100%:600s", windows=0, bad=2, collect_by=collect_by)
    try:
        world.start()
        world.release(2)
        world.wait("half of them have it", lambda: list(world.versions().values()).count(2) == devices // 2)
        world.wait("it is halted", lambda: set(world.state(2).values()) == {"halted"})
        (found,) = json.loads(tool("release", "status", "--json", "--db", str(world.db)))["rollouts"]
        say(f"halted in stage {found['stage']}: {found['evidence']['why']}")
        if found["evidence"]["test"] != "alarms" or found["devices"].get("failed"):
            world.failures.append(f"it is not the alarms that halted it: {found['evidence']}")
        if list(world.versions().values()).count(2) != devices // 2:
            world.failures.append(f"more than the first stage took it: {world.versions()}")
        world.withdraw(2)
        world.wait("all are back", lambda: world.all_at(0))
        return world.failures
    finally:
        world.stop()


def soak(scale: float) -> bool:
    """`stonechat soak rollout`: 12 agents on Linux and 8 on MicroPython, with a small scale fewer; then six, whose
    release alarms."""
    if mosquitto_path() is None:
        print("mosquitto is not installed (make setup, as root)")
        return False
    linux, boards = max(2, round(LINUX * min(scale, 1.0))), max(2, round(BOARDS * min(scale, 1.0)))
    failures = _in_a_folder(lambda folder: rollout_fleet.run(folder, linux, boards, _print))
    failures += _in_a_folder(lambda folder: run_alarms(folder, max(6, linux // 2), _print))
    for line in failures:
        print(f"FAILED: {line}")
    return not failures


def _print(line: str) -> None:
    print(line, flush=True)


def _in_a_folder(work: Callable[[Path], list[str]]) -> list[str]:
    folder = Path(tempfile.mkdtemp(prefix="stonechat-rollout-"))
    folder.chmod(0o711)
    try:
        return work(folder)
    except ConfigError as error:
        return [str(error)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
