"""Subscribe to the fleet's reports, verify and store each of them once, and acknowledge what is committed.

A device keeps a report until this acknowledgement. The broker's acknowledgement is not durable and does not free it.

Examples:
  stonechat collect --keys fleet/keys
  stonechat collect --broker broker.example:8883 --cafile ca.crt --cert me.crt --key me.key --keys fleet/keys
  stonechat collect --broker localhost --plain --keys fleet/keys --json --for 60
  stonechat collect --keys fleet/keys --dashboard    # and the fleet at http://127.0.0.1:8440/
  stonechat collect --keys fleet/keys --renew 12     # let quarantines last while their evidence goes on
  stonechat collect --keys fleet/keys --broker a.example --also b.example --db postgresql://db.example/fleet \\
    --shard 1/2
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import asdict

from stonechat.errors import StonechatError

from ..console import counted
from . import alert_settings, alerts, keyring, wire
from .broker import add_broker_arguments, broker_options, check_text, split_host
from .chunks import RATE_BYTES
from .collector import MQTT, RETRY_S, Collector, collect_garbage_rarely
from .incidents import Policy
from .monitor import Monitor
from .overview import fleet_table
from .page import Page
from .renewals import MOST_S, Renewals
from .shards import Shard
from .store import STORED, Keep, Store, StoreError
from .updates import Updates

__all__ = ["Collector"]
HELP = "subscribe to the fleet's reports and store them"
HOLDS_KEYS = True
SAY_AFTER_S = 10.0
HELD_S = 45.0  # a dead collector's session at a PostgreSQL server ends within that
NOT_YET = "no connection to the broker yet"
MAX_LINES = 10_000  # of --json that wait for whoever reads them


class JsonLines:
    """on_report for `--json`: lines on stdout, from a thread of their own. Whoever reads them, slowly or no longer,
    never holds up the collector; what they miss is counted and is in the database. `error` says so."""

    def __init__(self, handle: int = 1) -> None:
        self.error: str | None = None
        self.missed = 0
        self._handle = handle
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_LINES)
        self._thread = threading.Thread(target=self._write, name="json", daemon=True)
        self._thread.start()

    def __call__(self, report: wire.Report) -> None:
        left = ("body", "key", "current", "packed")
        values = {name: value for name, value in asdict(report).items() if name not in left}
        values["features"] = [asdict(feature) for feature in report.features]
        values["stream"] = report.stream.hex()
        try:
            self._lines.put_nowait(json.dumps(values).encode() + b"\n")
        except queue.Full:
            self.missed += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                while line:
                    line = line[os.write(self._handle, line) :]
                self.error = None
            except OSError as error:
                self.missed += 1
                gone = isinstance(error, BrokenPipeError)
                self.error = (
                    f"stdout: {'its reader is gone' if gone else error.strerror}; reports are stored all the same"
                )

    def close(self, wait_s: float = 5.0) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=wait_s)
            self._thread.join(wait_s)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_broker_arguments(parser)
    parser.add_argument("--client-id", help="MQTT client id (default: stonechat-collector, with the number of --shard)")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="one more broker of the fleet; may be repeated",
    )
    parser.add_argument(
        "--mqtt",
        choices=MQTT,
        default="auto",
        help="version of MQTT, or the paho client (default %(default)s: 5, and 3.1.1 where the broker has no 5)",
    )
    parser.add_argument(
        "--shard", default="", metavar="N/M", help="take the devices of the N-th of M collectors only (default: all)"
    )
    for option, what, days in (
        ("--keep-reports", "a report", Keep.reports),
        ("--keep-hourly", "the sums of an hour", Keep.hourly),
        ("--keep-daily", "the sums of a day", Keep.daily),
    ):
        text = f"delete {what} after DAYS, 0 for never (default %(default)s)"
        parser.add_argument(option, type=_days, default=days, metavar="DAYS", help=text)
    parser.add_argument(
        "--update-rate",
        type=_rate,
        default=RATE_BYTES / 1000,
        metavar="KB",
        help="of releases, at most so much a second to all devices together (default %(default)g)",
    )
    parser.add_argument(
        "--renew",
        type=_hours,
        nargs="?",
        const=MOST_S / 3600,
        metavar="HOURS",
        help="let a device's throttle or quarantine last while its evidence goes on, at most HOURS (default %(const)g);"
        " without this each ends by itself",
    )
    parser.add_argument("--alerts", metavar="FILE", help="whom to notify: TOML; `stonechat fleet example` prints one")
    parser.add_argument(
        "--dashboard",
        nargs="?",
        const="127.0.0.1:8440",
        metavar="HOST:PORT",
        help="also show the fleet in a browser of this machine (default %(const)s); log-ins, TLS and commands:"
        " `stonechat dashboard`",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a report on stdout, instead of the table")
    parser.add_argument("--for", dest="for_s", type=float, metavar="SECONDS", help="stop after this time")


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days <= 100_000:
        raise argparse.ArgumentTypeError("want 0 to 100000 days")
    return days


def _hours(text: str) -> float:
    hours = float(text)
    if not 0 < hours <= 8760:
        raise argparse.ArgumentTypeError("want more than 0, at most 8760 hours")
    return hours


def _rate(text: str) -> float:
    rate = float(text)
    if not 1 <= rate <= 1_000_000:
        raise argparse.ArgumentTypeError("want 1 to 1000000 kB a second")
    return rate


def run(args: argparse.Namespace) -> int:
    shard = Shard(args.shard)
    keep = Keep(args.keep_reports, args.keep_hourly, args.keep_daily)
    keys = keyring.Keys(args.keys)
    options = broker_options(args, "collector")
    check_text(args.client_id, "--client-id")
    more = [split_host(text, "--also") for text in args.also]
    also = [(host, port or int(options["port"])) for host, port in more]
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    end_s = time.monotonic() + (args.for_s if args.for_s is not None else float("inf"))
    collect_garbage_rarely()
    settings = alert_settings.load(args.alerts) if args.alerts else alert_settings.Settings(Policy(), ())
    if args.alerts and not settings.receivers:
        _say(f"{args.alerts}: no receiver: nobody is notified; take away the # before [[receivers]]")
    with contextlib.ExitStack() as opened:
        store = _open(args.db, shard, opened, stop, end_s)
        lines = JsonLines() if args.json else None
        notifier = alerts.Alerts(settings)
        monitor = Monitor(store, settings.policy, notifier.notify, shard=shard, unsent=notifier.unsent)
        updates = Updates(
            store,
            keys,
            prefix=options["prefix"],
            shard=shard,
            presence=monitor.presence,
            labels=lambda: monitor.labels,
            clock=lambda: monitor.now_s,
            steady=time.monotonic,
            rate_bytes=args.update_rate * 1000,
        )
        monitor.also(updates.alerts)
        if args.renew is not None:
            most_s = args.renew * 3600
            options["renewals"] = Renewals(store, keys, prefix=options["prefix"], most_s=most_s, shard=shard)
        opened.callback(_note, monitor)  # what the receivers had not taken in the end
        opened.enter_context(notifier)
        options["client_id"] = args.client_id or "stonechat-collector" + (f"-{shard.number}" if args.shard else "")
        options |= {"mqtt": args.mqtt, "also": also, "monitor": monitor, "updates": updates}
        page = None
        if args.dashboard is not None:
            page = Page(args.db, args.dashboard)
            opened.callback(page.close)
            _say(f"the fleet is at {page.url}")
        collector = Collector(store, keys, on_report=lines, keep=keep, shard=shard, **options)
        with collector:
            if args.json or not sys.stdout.isatty():
                _wait(collector, lines, notifier, page, stop, end_s)
            else:
                _show(collector, page, stop, end_s)
        if lines:
            lines.close()
            if lines.missed:
                _say(f"{counted(lines.missed, 'report')} not written to stdout, but in the database")
    if collector.failure is not None:
        error = collector.failure
        raise StonechatError(f"stopped by a fault of its own, nothing is lost: {type(error).__name__}: {error}")
    _say(_line(collector), "")
    if not collector.ever_connected:
        _say(f"never connected: {collector.error or 'no time to'}")
        return 1
    return 0


def _open(db: str, shard: Shard, opened: contextlib.ExitStack, stop: threading.Event, end_s: float) -> Store:
    """The database, as the only collector of this shard; a full disk, a lock or a server that is away is waited for.
    What another collector holds is waited for HELD_S: a server needs time to see that one was killed."""
    said = ""
    held_until_s = time.monotonic() + HELD_S
    while True:
        with contextlib.ExitStack() as made:
            try:
                store = made.enter_context(Store(db, _say, shard.name))
                made.enter_context(store.collecting())
                opened.push(made.pop_all())
                return store
            except StoreError as error:
                now_s = time.monotonic()
                if not (error.passes or error.held and now_s < held_until_s) or stop.is_set() or now_s >= end_s:
                    raise
                if said != (said := str(error)):
                    _say(f"{error}; waiting for it")
        stop.wait(min(RETRY_S, max(0.0, end_s - time.monotonic())))


def _note(monitor: Monitor) -> None:
    with contextlib.suppress(StoreError):
        monitor.close()


def _say(text: str, start: str = "stonechat collect: ") -> None:
    """On stderr, if somebody is still there to read it."""
    with contextlib.suppress(OSError, ValueError):
        print(start + text, file=sys.stderr, flush=True)


def _line(collector: Collector) -> str:
    return ", ".join(f"{count} {name}" for name, count in collector.counts.items() if count or name == STORED)


def _wait(
    collector: Collector,
    lines: JsonLines | None,
    notifier: alerts.Alerts,
    page: Page | None,
    stop: threading.Event,
    end_s: float,
) -> None:
    said: set[str] = set()
    begin_s = time.monotonic()
    while time.monotonic() < end_s and not stop.wait(0.2) and collector.failure is None:
        if page is not None and page.error:
            _say(page.error)
            page = None
        problems = [*collector.keys.problems.values(), *notifier.errors]
        now = {text for text in (collector.error, lines and lines.error, *problems) if text}
        if not (now or collector.ever_connected) and time.monotonic() - begin_s > SAY_AFTER_S:
            now.add(NOT_YET)
        for text in sorted(now - said):
            _say(text)
        if said and not now and collector.connected.is_set():
            _say("well again: connected, and the database takes reports")
        said = now


def _show(collector: Collector, page: Page | None, stop: threading.Event, end_s: float) -> None:
    from rich.live import Live

    with Live(refresh_per_second=2) as live:
        while time.monotonic() < end_s and not stop.wait(0.5) and collector.failure is None:
            caption = collector.error or ("" if collector.ever_connected else NOT_YET) or _line(collector)
            if collector.connected.is_set() and not any(collector.counts.values()):
                caption = f"connected; nothing yet on {collector.prefix}+: is --prefix the fleet's?"
            for problem in collector.keys.problems.values():
                caption += f"; {problem}"
            if page is not None:
                caption += f"; {page.error or page.url}"
            with contextlib.suppress(StoreError):
                states = collector.monitor.states() if collector.monitor else None
                live.update(fleet_table(collector.store, caption, states))
