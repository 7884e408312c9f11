"""Show live features, their distance from normal, and the verdict.

With a model (the shipped one of this device's schema unless --model names another) z and the verdict are those of the
agent; --state adds what a running agent has learned. Without a model, the first windows define what is normal, for
display only.

Keys: q quits, s sorts by how unusual a feature is or by the schema, r starts the learning of this view again.

Examples:
  stonechat top
  stonechat top --no-model --interval 2 --interface eth0 --interface lo
  stonechat top --once --json
  stonechat top --json --windows 100 > windows.jsonl
"""

import argparse
import contextlib
import json
import os
import select
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError, StateError, StonechatError
from stonechat.linux import schemas, shipped
from stonechat.linux.collector import LinuxCollector
from stonechat.model import load_model
from stonechat.state import State

from ..console import has, named, read_file
from .top_screen import plain, screen
from .top_view import View

DEFAULT_INTERVAL_S = 2.0
_KEY_WAIT_S = 0.25
_LINES_AROUND_TABLE = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        type=shipped.path,
        metavar="FILE",
        help="a .tflite, or the name of a shipped model (default: that of the schema)",
    )
    add("--no-model", action="store_true", help="learn what is usual from the first windows instead")
    add("--state", metavar="FILE", help="the state file of an agent, for what it has learned; it is only read")
    add("--collector", choices=("auto", "proc", "bpf"), default="auto", help="auto: BPF where it starts")
    add("--interface", action="append", metavar="NAME", help="count this interface only (again for more)")
    add("--cgroup", metavar="DIR", help="watch this cgroup v2 folder instead of the whole machine (BPF)")
    add("--disks", metavar="A,B", help="block devices whose reads and writes count (default: all)")
    add("--peers", type=int, default=0, metavar="N", help="judge what is sent to each host, too, learned in N windows")
    add("--interval", type=float, metavar="S", help="seconds a window, without a model (default 2)")
    add("--windows", type=int, metavar="N", help="stop after N windows")
    add("--once", action="store_true", help="one window, then stop (the same as --windows 1)")
    add("--json", action="store_true", help="one JSON object a window and nothing else")


def run(args: argparse.Namespace) -> int:
    interval_s = args.interval if args.interval is not None else DEFAULT_INTERVAL_S
    if not 0.1 <= interval_s <= 3600:
        raise ConfigError(f"--interval {interval_s}: want 0.1 to 3600 seconds")
    if args.windows is not None and args.windows < 1:
        raise ConfigError(f"--windows {args.windows}: want at least 1")
    if not 0 <= args.peers <= 10_000_000:
        raise ConfigError(f"--peers {args.peers}: want 0 to 10,000,000 windows")
    interfaces = tuple(args.interface) if args.interface else None
    model = named_model(args.model) if args.model and not args.no_model else None
    disks = tuple(word for word in args.disks.split(",") if word) if args.disks else None
    collector = open_matching(args.collector, interfaces, model, args.cgroup, disks)
    if model is None and not args.no_model:
        model = shipped_model(collector.schema.name)
    try:
        state = read_state(args.state) if args.state else None
        view = View(collector, model, state, interval_s, args.peers)
        limit = 1 if args.once else args.windows
        interactive = not args.json and not args.once and sys.stdout.isatty() and has("rich")
        return watch_live(view, limit) if interactive else watch_plain(view, limit, args.json)
    finally:
        collector.close()


def read_state(path: str) -> State:
    """What an agent has learned, from a copy: State sets a damaged file aside, which is the agent's business alone.
    Raises OSError where there is none, StateError where it can't be read."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "state")
        copy.write_bytes(read_file(path))
        state = State(str(copy))
        state.path = None
    if state.damaged:
        raise StateError(f"--state {path}: {state.damaged}")
    return state


def named_model(path: str) -> Any:
    """Raises OSError, ModelError."""
    with named(path):
        return _load(Path(path))


def open_matching(
    kind: str,
    interfaces: tuple[str, ...] | None,
    model: Any,
    cgroup: str | None = None,
    disks: tuple[str, ...] | None = None,
) -> LinuxCollector:
    """The collector that `kind` asks for; with "auto" the one of the model's schema, if there is a model."""
    use_bpf: bool | str = "auto" if kind == "auto" else kind == "bpf"
    if model and model.metadata and kind == "auto":
        use_bpf = bool(model.metadata.schema_id == schemas.LINUX_1.id)
    return LinuxCollector(interfaces, use_bpf=use_bpf, cgroup=cgroup, disks=disks)


def shipped_model(schema_name: str) -> Any:
    return _load(Path(shipped.path(schema_name))) if schema_name in shipped.names() else None


def _load(file: Path) -> Any:
    return load_model(read_file(file))


def watch_plain(view: View, limit: int | None, as_json: bool) -> int:
    for shown in _windows(view, limit):
        if as_json:
            print(json.dumps(shown), flush=True)
        elif not has("rich"):
            print(plain(view), flush=True)
        else:
            from rich.console import Console

            Console().print(screen(view, by_z=False))
    return 0


def _windows(view: View, limit: int | None) -> Iterator[dict[str, Any]]:
    due_s = time.monotonic()
    while limit is None or view.windows < limit:
        shown = view.step()
        if shown:
            yield shown
        due_s = max(due_s + view.window_ms / 1000, time.monotonic())
        if limit is None or view.windows < limit:
            time.sleep(max(0.0, due_s - time.monotonic()))


def watch_live(view: View, limit: int | None) -> int:
    from rich.live import Live

    by_z = False
    error = ""
    due_s = time.monotonic()
    with _keys() as key_within, Live(auto_refresh=False, screen=True) as live:
        while limit is None or view.windows < limit:
            now_s = time.monotonic()
            if now_s >= due_s:
                due_s = max(due_s + view.window_ms / 1000, now_s)
                try:
                    view.step()
                    error = ""
                except (StonechatError, OSError) as problem:  # the next window is another try
                    error = str(problem)
            rows = max(3, live.console.height - _LINES_AROUND_TABLE)
            next_s = max(0.0, due_s - time.monotonic())
            live.update(screen(view, by_z, rows, next_s, error), refresh=True)
            key = key_within(min(_KEY_WAIT_S, max(0.0, due_s - time.monotonic())))
            if key in ("q", "\x03", "\x1b"):
                break
            if key == "s":
                by_z = not by_z
            if key == "r":
                view.recalibrate()
    return 0


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """Keys one by one without Enter -> a function that waits N seconds and returns the key or "". Where stdin
    is no terminal, it only waits."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield lambda seconds: os.read(fd, 1).decode("latin-1") if select.select([fd], [], [], seconds)[0] else ""
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _no_key(seconds: float) -> str:
    time.sleep(seconds)
    return ""
