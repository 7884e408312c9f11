"""Runs a simulated product of these examples. A minute of its life takes no time: days are recorded in a second.

  python product.py record OUT.csv.gz --days 28 --seed 1      its counters, window by window, as `stonechat` reads them
  python product.py record OUT.csv.gz --what NAME             four ordinary days, then one on which NAME happens
  python product.py watch MODEL.tflite --what NAME            the same days, scored by the agent as they pass
  python product.py live FOLDER --seconds 60                  real time: each counter in a file, as a firmware writes it

What a product of your own needs of all this is in `channel()`: a schema, a function that reads the counters, a model.
"""

import argparse
import sys
import time
from pathlib import Path

from stonechat.custom_counters import CounterCollector, counter_schema
from stonechat.errors import StonechatError
from stonechat.loop import Channel
from stonechat.model import load_model
from stonechat.state import State
from stonechat.window import Window

DAY_MINUTES = 24 * 60
FIRST_DAY_S = 1_800_000_000 - 1_800_000_000 % 86_400
LEVELS = ("normal", "watch", "ALARM")


class Product:
    """What each example fills in.

    SCHEMA, COUNTERS: the schema's name and (name, unit, kind) of each counter. WINDOW_S: of its windows. SCENARIOS:
    name -> (first hour, hours, whether it is misuse, what happens). minute(hour, what) lives one minute; read() gives
    one number per counter."""

    SCHEMA = ""
    COUNTERS = ()
    WINDOW_S = 600
    SCENARIOS = {}

    def __init__(self, seed):
        raise NotImplementedError

    def begin_day(self):
        """Called at midnight."""

    def minute(self, hour, what):
        raise NotImplementedError

    def read(self):
        raise NotImplementedError


def channel(product, model):
    """The agent's own path from the product's counters to a verdict."""
    collector = CounterCollector(counter_schema(product.SCHEMA, product.COUNTERS), product.read)
    return Channel(collector, model, State())


def windows(product, days, what, end_window):
    """Live `days` ordinary days and, where `what` names a scenario, one more on which it happens. Calls
    end_window(now_ms) at the start and after each window -> yields (time in s, label, what it returned)."""
    first_hour, hours, misuse, _ = product.SCENARIOS[what] if what else (0, 0, False, "")
    end_window(0)
    for minute in range((days + bool(what)) * DAY_MINUTES):
        hour = minute % DAY_MINUTES // 60
        if minute % DAY_MINUTES == 0:
            product.begin_day()
        on = bool(what) and minute >= days * DAY_MINUTES and first_hour <= hour < first_hour + hours
        product.minute(hour, what if on else "")
        if (minute + 1) * 60 % product.WINDOW_S == 0:
            now_s = (minute + 1) * 60
            yield FIRST_DAY_S + now_s, what if on and misuse else "benign", end_window(now_s * 1000)


def record(product, args):
    from stonechat_tools.traces.format import TraceWriter

    collector = CounterCollector(counter_schema(product.SCHEMA, product.COUNTERS), product.read)
    window = Window(collector.schema, product.WINDOW_S * 1000)
    values = [0] * len(collector.schema)

    def end_window(now_ms):
        collector.read(values)
        return window.push(values, now_ms)

    Path(args.file).unlink(missing_ok=True)
    last = "benign"
    device = f"{product.SCHEMA}-{args.seed}"
    with TraceWriter(args.file, collector.schema, window.window_ms, device) as writer:
        for t_s, label, whole in windows(product, args.days, args.what, end_window):
            if label == "benign" != last:
                break  # what misuse leaves behind is neither benign nor misuse
            last = label
            if whole:
                writer.append(t_s, window.elapsed_ms, label, window.deltas)
    print(f"{args.file}: {writer.windows} windows of {product.WINDOW_S} s, {device}")


def watch(product, args):
    with open(args.file, "rb") as file:
        own = channel(product, load_model(file.read()))
    names = [name for name, _, _ in product.COUNTERS]
    learned = scored = alarms = 0
    for t_s, _, verdict in windows(product, args.days, args.what, own.end_window):
        if verdict is None:
            continue
        learned += verdict.learning
        scored += not verdict.learning
        if verdict.changed:
            day, at = divmod(t_s - FIRST_DAY_S, 86_400)
            why = ", ".join(f"{names[i]} {z / 16:+.1f} sd" for i, z, _ in verdict.explain(2))
            print(f"day {day + 1} {at // 3600:02}:{at % 3600 // 60:02} {LEVELS[verdict.level]} {why}")
            alarms += verdict.level == 2
    print(f"{learned} windows learned, {scored} scored, {alarms} alarms")


def live(product, args):
    folder = Path(args.file)
    folder.mkdir(parents=True, exist_ok=True)
    end_s = time.monotonic() + args.seconds
    minute = 0
    while time.monotonic() < end_s:
        product.minute(minute // 60 % 24, args.what)
        for (name, _, _), value in zip(product.COUNTERS, product.read(), strict=True):
            new = folder / (name + ".new")
            new.write_text(f"{int(value)}\n")
            new.replace(folder / name)  # whoever reads it sees a whole number
        minute += 1
        time.sleep(min(0.05, max(0.0, end_s - time.monotonic())))


def main(kind):
    parser = argparse.ArgumentParser(description=kind.__doc__)
    parser.add_argument("action", choices=("record", "watch", "live"))
    parser.add_argument("file", help="the trace to write, the model to watch with, or the folder of the counters")
    scenarios = "; ".join(f"{name}: {about[3]}" for name, about in kind.SCENARIOS.items())
    parser.add_argument("--what", choices=list(kind.SCENARIOS), default="", help=scenarios)
    parser.add_argument("--days", type=int, default=4, help="ordinary days (default 4)")
    parser.add_argument("--seed", type=int, default=1, help="of the product's life")
    parser.add_argument("--seconds", type=float, default=60.0, help="with live: for how long")
    args = parser.parse_args()
    try:
        {"record": record, "watch": watch, "live": live}[args.action](kind(args.seed), args)
    except (StonechatError, OSError) as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return 1
    return 0
