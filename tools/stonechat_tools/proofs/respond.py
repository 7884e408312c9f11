"""Does a response ever lock anybody out, or leave a rule behind? Seeded chaos in network namespaces.

Each run is a device with a response, an outside with its broker, name servers, operator and attacker, and a random
sequence of what goes wrong: the agent or the collector killed, the broker away, the clocks jump, the machine suspended
or rebooted, the allow-list, address or gateway changed, the tables deleted or damaged from outside; in some runs the
attacker has the operator's address, or the kernel has no egress chain. All the while datagrams and connections go every
way. The lease, the enforcer and the allow-list are the agent's own (respond_agent.py); its alarms are given. With
--daemon all is real (respond_daemon.py): the daemon, mosquitto, a collector's signed renewals, an operator's command.

A lock-out is a flow of the allow-list that is stopped at any time, or any other flow that is stopped when no lease is
in force: later than its seconds after the last renewal that was accepted, after its end, a reboot, or a new start.

Examples:
  python -m stonechat_tools.proofs.respond --runs 100 --parallel 8
  python -m stonechat_tools.proofs.respond --seed 17             # one run, with what happened
  python -m stonechat_tools.proofs.respond --runs 10 --seconds 120
  python -m stonechat_tools.proofs.respond --runs 20 --daemon
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from ..fleet.local_broker import mosquitto_path
from .respond_daemon import WINDOW_MS, DaemonRun
from .respond_run import Run
from .respond_traffic import Outcome
from .world.devices import make_models

RUNS = 990
LONG_RUNS = 10
DAEMON_RUNS = 100
T1_S = 2
LONG_T1_S = 120
PARALLEL = 10
MODULE = "stonechat_tools.proofs.respond"


def one(seed: int, t1_s: int = T1_S, models: Path | None = None) -> tuple[Outcome, list[str]]:
    """models: for a run with the real daemon, as world.devices.make_models() makes them."""
    with Run(seed, t1_s) if models is None else DaemonRun(seed, t1_s, models) as run:
        run.play()
    return run.outcome, run.said


def many(seeds: list[int], t1_s: int, parallel: int, models: Path | None = None) -> Iterator[Outcome]:
    """Each run in a process of its own: its namespaces go with it, however it ends."""

    def start(seed: int) -> Outcome:
        words = [sys.executable, "-m", MODULE, "--seed", str(seed), "--seconds", str(t1_s), "--json"]
        words += [] if models is None else ["--models", str(models)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300 + 10 * t1_s, check=False)
        if done.returncode not in (0, 1) or not done.stdout:
            return Outcome(seed, broken=done.stderr.strip()[-1000:] or "no answer")
        return Outcome(**json.loads(done.stdout))

    with ThreadPoolExecutor(parallel) as pool:
        yield from pool.map(start, seeds)


def prove_with_daemon(runs: int, parallel: int = PARALLEL, first: int = 2_000_000) -> bool:
    """As prove(), with everything real."""
    if mosquitto_path() is None:
        print("  the real daemon needs mosquitto (make setup, as root)")
        return False
    with tempfile.TemporaryDirectory(prefix="stonechat-models-") as folder:
        os.chmod(folder, 0o711)  # the agent's own user reads them
        models = Path(folder) / "models"
        make_models(models, WINDOW_MS)
        return prove(runs, T1_S, parallel, first, models)


def prove(runs: int, t1_s: int, parallel: int = PARALLEL, first: int = 0, models: Path | None = None) -> bool:
    """Print the figures -> no lock-out, and nothing left behind."""
    total = Outcome(first)
    counts: dict[str, int] = {}
    broken = 0
    began_s = time.monotonic()
    for number, outcome in enumerate(many(list(range(first, first + runs)), t1_s, parallel, models), 1):
        for name in ("left_behind", "probes", "stopped", "leases", "renewals", "inert"):
            setattr(total, name, getattr(total, name) + getattr(outcome, name))
        total.lock_outs += outcome.lock_outs
        if outcome.broken:
            broken += 1
            print(f"  seed {outcome.seed} could not be carried out: {outcome.broken}", flush=True)
        for name in outcome.events:
            counts[name] = counts.get(name, 0) + 1
        if outcome.lock_outs or outcome.left_behind:
            what = "; ".join(outcome.lock_outs[:3]) or f"{outcome.left_behind} tables left"
            print(f"  seed {outcome.seed}: {what}", flush=True)
            print("".join(f"    {line}\n" for line in outcome.log), end="", flush=True)
        if number % 50 == 0:
            print(f"  {number} runs, {len(total.lock_outs)} lock-outs, {time.monotonic() - began_s:.0f} s", flush=True)
    print("  " + ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in sorted(counts.items())))
    print(
        f"  {runs - broken} runs with leases of {t1_s} s: {total.leases} leases, {total.renewals} renewals, "
        f"{total.probes} probes, {total.stopped} of them stopped within a lease;\n"
        f"  {len(total.lock_outs)} lock-outs, {total.left_behind} tables left behind ({total.inert} of killed agents "
        "stopped nothing any more and went with the next start)",
        flush=True,
    )
    return not total.lock_outs and not total.left_behind and not broken and total.stopped > 0


def soak(scale: float) -> bool:
    if os.geteuid():
        print("  needs root: network namespaces")
        return False
    held = prove(max(1, round(RUNS * scale)), T1_S)
    long_runs = max(1, round(LONG_RUNS * scale))
    held &= prove(long_runs, LONG_T1_S, long_runs, first=1_000_000)
    print("  with the real daemon, broker and collector:")
    return prove_with_daemon(max(1, round(DAEMON_RUNS * scale))) and held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="one run")
    parser.add_argument("--runs", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--seconds", type=int, default=T1_S, help="of a lease (default 2)")
    parser.add_argument("--parallel", type=int, default=PARALLEL, help="how many at once (default 10)")
    parser.add_argument("--daemon", action="store_true", help="with the real daemon, broker and collector")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one run for machines")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if args.seed is None and args.daemon:
        return 0 if prove_with_daemon(args.runs, args.parallel) else 1
    if args.seed is None:
        return 0 if prove(args.runs, args.seconds, args.parallel) else 1
    outcome, said = one(args.seed, args.seconds, args.models)
    if args.json:
        print(json.dumps(asdict(outcome)))
    else:
        print("\n".join(said))
        print(outcome)
    return 1 if outcome.lock_outs or outcome.left_behind else 0


if __name__ == "__main__":
    raise SystemExit(main())
