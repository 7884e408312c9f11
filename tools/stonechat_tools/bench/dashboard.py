"""The dashboard with a large fleet, in a real browser: first paint, sizes, and what an update each second costs.

A collector's database of N made devices is served by `stonechat dashboard` in a process of its own; a headless Chromium
with an empty profile opens the map. Then a sixtieth of the fleet reports each second. Blocks are the browser's own long
tasks (over 50 ms on the main thread) after the map is there. Needs Debian's package chromium.

Examples:
  stonechat bench dashboard
  stonechat bench dashboard --devices 50000 --seconds 60
"""

import argparse
import gzip
import json
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

HELP = "the dashboard: first paint, sizes, main-thread blocks at an update each second"
WATCH = """
window.blocks = [];
new PerformanceObserver((list) => {
  for (const each of list.getEntries()) window.blocks.push([each.startTime, each.duration]);
}).observe({ type: "longtask", buffered: true });
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=int, default=10_000, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=30.0, help="of updates (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="times that the page is opened (default %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..dashboard.state import load_files
    from ..proofs.browser import CHROMIUM, browser
    from ..proofs.dashboard_fleet import MadeFleet
    from ..proofs.screenshots import serving

    if CHROMIUM is None:
        raise ConfigError("chromium is not installed (apt-get install chromium)")
    if not 1 <= args.devices <= 99_999:
        raise ConfigError(f"--devices {args.devices}: from 1 to 99999")
    figures: dict[str, Any] = {"devices": args.devices}
    figures["pages_bytes"] = sum(len(file.packed) for file in load_files().values())
    with tempfile.TemporaryDirectory(prefix="stonechat-dashboard-") as folder:
        db = Path(folder) / "fleet.db"
        _progress(f"making {args.devices} devices")
        fleet = MadeFleet(db, args.devices)
        with serving(db) as url, browser() as page:
            page.show(1280, 800)
            figures["data_bytes"] = len(_get(url + "api/fleet"))
            page.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
            paints, shown = [], []
            for n in range(args.rounds):
                _progress(f"opening the page, {n + 1} of {args.rounds}")
                page.open("about:blank")
                page.open(url)
                page.wait("document.querySelector('.legend li')")
                page.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
                shown.append(page.run("performance.now()"))
                paints.append(page.run("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            figures["first_paint_ms"] = [round(each) for each in sorted(paints)]
            figures["map_ms"] = [round(each) for each in sorted(shown)]
            time.sleep(2)
            began = page.run("performance.now()")
            changed, lateness = 0, 0.0
            end_s = time.monotonic() + args.seconds
            _progress(f"an update each second for {args.seconds:.0f} s")
            before = page.run("performance.getEntriesByType('resource').length")
            while time.monotonic() < end_s:
                next_s = time.monotonic() + 1.0
                changed += fleet.beat()
                lateness = max(lateness, time.monotonic() - next_s)
                time.sleep(max(0.0, next_s - time.monotonic()))
            blocks = [length for start, length in page.run("window.blocks") if start > began]
            figures |= {
                "changed": changed,
                "blocks": len(blocks),
                "longest_block_ms": max(blocks, default=0),
                "load_blocks_ms": [round(length) for start, length in page.run("window.blocks") if start <= began],
                "requests_meanwhile": page.run("performance.getEntriesByType('resource').length") - before,
                "errors": page.errors,
                "elsewhere": [each for each in page.requests if not each.startswith((url, "about:", "data:"))],
            }
            snapshot = json.loads(gzip.decompress(_get(url + "api/fleet")))
            heard = page.run("import('/static/data.js').then((data) => data.fleet.about.version)")
            figures["versions_behind"] = snapshot["version"] - heard
        fleet.close()
    _show(figures)
    return figures


def _get(url: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept-Encoding": "gzip"}), timeout=60) as answer:
        found: bytes = answer.read()
        return found


def _progress(text: str) -> None:
    print(f"bench dashboard: {text}", file=sys.stderr, flush=True)


def _show(figures: dict[str, Any]) -> None:
    print(f"{figures['devices']} devices")
    print(f"  HTML, CSS, JavaScript   {figures['pages_bytes'] / 1000:.1f} kB compressed")
    print(f"  first data              {figures['data_bytes'] / 1000:.1f} kB compressed")
    print(f"  first paint             {figures['first_paint_ms']} ms")
    print(f"  the map is there        {figures['map_ms']} ms")
    print(
        f"  devices that changed    {figures['changed']}, as events; {figures['requests_meanwhile']} more requests,"
        f" the page is {figures['versions_behind']} versions behind"
    )
    print(f"  main-thread blocks      {figures['blocks']} over 50 ms, the longest {figures['longest_block_ms']} ms")
    print(f"  while it loaded         {figures['load_blocks_ms']} ms")
    print(f"  errors, other hosts     {len(figures['errors'])}, {len(figures['elsewhere'])}")
