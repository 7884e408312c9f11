"""Run the long proofs, each bounded in count: `make test` runs them for seconds, this runs millions of cases.

Examples:
  stonechat soak                  # all of them
  stonechat soak reader           # one
  stonechat soak --scale 0.01     # a hundredth of each
"""

import argparse
import importlib

# name: "module:function"; function(scale: float) prints its figures and returns True where they hold
SOAKS = {
    "exact": "stonechat_tools.proofs.exactness:soak",
    "reader": "stonechat_tools.proofs.fuzz_reader:soak",
    "wire": "stonechat_tools.proofs.fuzz_wire:soak",
    "power": "stonechat_tools.proofs.power_cuts:soak",
    "updates": "stonechat_tools.proofs.update_cuts:soak",
    "mqtt": "stonechat_tools.proofs.mqtt:soak",
    "fleet": "stonechat_tools.proofs.fleet_replay:soak",
    "outages": "stonechat_tools.proofs.outages:soak",
    "rollout": "stonechat_tools.proofs.rollout_alarms:soak",
    "shards": "stonechat_tools.proofs.shards:soak",
    "respond": "stonechat_tools.proofs.respond:soak",
    "world": "stonechat_tools.proofs.world.run:soak",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="*", help="which (default: all): " + ", ".join(SOAKS))
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full length (default 1)")


def run(args: argparse.Namespace) -> int:
    unknown = [job for job in args.job if job not in SOAKS]
    if unknown:
        print(f"stonechat soak: no job called {', '.join(unknown)}; there are {', '.join(SOAKS)}")
        return 2
    failed = []
    for job in args.job or SOAKS:
        module, function = SOAKS[job].split(":")
        print(f"== {job}", flush=True)
        if not getattr(importlib.import_module(module), function)(args.scale):
            failed.append(job)
    print("failed: " + ", ".join(failed) if failed else "all held")
    return 1 if failed else 0
