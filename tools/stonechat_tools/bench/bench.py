"""Run benchmarks side by side in one run, ratios first. Absolute times are those of this machine.

Examples:
  stonechat bench inference
  stonechat bench collect --json collect.json
  stonechat bench all
"""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

# name: module with HELP, add_arguments(parser) and run(args) -> dict that --json writes
BENCHES = {
    "inference": "stonechat_tools.bench.inference",
    "collect": "stonechat_tools.bench.collect",
    "agent": "stonechat_tools.bench.agent",
    "board": "stonechat_tools.bench.board",
    "wire": "stonechat_tools.bench.wire",
    "fleet": "stonechat_tools.bench.fleet",
    "peers": "stonechat_tools.bench.peers",
    "rollout": "stonechat_tools.bench.rollout",
    "update": "stonechat_tools.bench.update",
    "dashboard": "stonechat_tools.bench.dashboard",
    "respond": "stonechat_tools.bench.respond",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    for name, module in BENCHES.items():
        bench = importlib.import_module(module)
        sub = names.add_parser(
            name,
            help=bench.HELP,
            description=bench.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", metavar="FILE", help="write the figures to FILE as JSON")
        bench.add_arguments(sub)
    names.add_parser("all", help="run every benchmark with its defaults").add_argument(
        "--json", metavar="FILE", help="write the figures to FILE as JSON"
    )


def run(args: argparse.Namespace) -> int:
    figures: dict[str, Any] = {}
    if args.bench == "all":
        for name, module in BENCHES.items():
            bench = importlib.import_module(module)
            defaults = argparse.ArgumentParser()
            bench.add_arguments(defaults)
            figures[name] = bench.run(defaults.parse_args([]))
    else:
        figures = importlib.import_module(BENCHES[args.bench]).run(args)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0
