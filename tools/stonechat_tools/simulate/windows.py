"""The windows of a simulated device: recorded ones or drawn from the model, and what an attack makes of them."""

import argparse
import random
from collections.abc import Iterator
from typing import Any

from stonechat.agent import Agent
from stonechat.delivery import Delivery
from stonechat.errors import ConfigError
from stonechat.features import SHARE, Normalization
from stonechat.linux import shipped
from stonechat.model import load_model
from stonechat.outbox_memory import MemoryOutbox
from stonechat.replay import Replay
from stonechat.schema import Schema
from stonechat.state import State

from ..console import named, read_file
from ..schemas import SCHEMAS

Windows = list[tuple[int, list[int]]]  # elapsed_ms, deltas
LEARNED_MARGIN = 30  # windows beyond those that the model learns from

# What attacks do to a board's or a Linux device's counters, where no recording of them is given: column, and how many
# times the usual, at least how much.
FAMILIES: dict[str, tuple[str, dict[str, tuple[float, int]]]] = {
    "mirai": (
        "scans for telnet logins",
        {
            "sockets": (20, 300),
            "conn_out": (20, 300),
            "conn_unanswered": (1, 250),
            "conn_failed": (1, 250),
            "conn_mute": (1, 200),
            "peers": (10, 64),
            "new_peers": (1, 64),
        },
    ),
    "flood": (
        "floods a victim with UDP",
        {"udp_out": (50, 5000), "bytes_out": (100, 5_000_000), "writes": (50, 5000), "new_peer_bytes": (1, 5_000_000)},
    ),
    "exfiltration": ("sends its data to a stranger", {"bytes_out": (50, 2_000_000), "new_peer_bytes": (1, 2_000_000)}),
}


def read_model(text: str, speed: int) -> tuple[Any, Schema]:
    path = shipped.path(text)
    try:
        with named(path):
            model = load_model(read_file(path))
    except OSError as error:
        raise ConfigError(f"--model {text}: {error.strerror}; shipped: {', '.join(shipped.names())}") from None
    schema = SCHEMAS.get(bytes(model.metadata.schema_id)) if model.metadata else None
    if schema is None:
        raise ConfigError(f"--model {text}: it has no schema that stonechat knows")
    model.metadata.window_ms = max(100, model.metadata.window_ms // speed)
    return model, schema


def windows_of(
    args: argparse.Namespace, model: Any, schema: Schema, chance: random.Random
) -> tuple[Windows, dict[str, Windows]]:
    """-> (benign windows, those of each attack), all of the model's window length."""
    window_ms = model.metadata.window_ms
    if args.trace:
        from ..traces.files import read_all
        from ..traces.format import is_benign

        trace = read_all(args.trace)
        if trace.schema.id != schema.id:
            raise ConfigError(f"--trace is of schema {trace.schema.name}, the model of {schema.name}")
        benign: Windows = []
        attacks: dict[str, Windows] = {}
        for label, elapsed_ms, deltas in zip(trace.labels, trace.elapsed_ms, trace.deltas, strict=True):
            row = (max(1, int(elapsed_ms) * window_ms // trace.window_ms), [int(value) for value in deltas])
            (benign if is_benign(str(label)) else attacks.setdefault(str(label), [])).append(row)
        if not benign:
            raise ConfigError("--trace: no benign windows in it")
        if "mirai" not in attacks and "scan_connect" in attacks:
            attacks["mirai"] = attacks["scan_connect"]
        return benign, attacks
    benign = drawn(model, schema, chance, 600)
    names = [column[0] for column in schema.columns]
    attacks = {}
    for family, (_, columns) in FAMILIES.items():
        known = {names.index(name): factor for name, factor in columns.items() if name in names}
        if not known:
            continue
        rows = []
        for elapsed_ms, deltas in benign[:60]:
            changed = list(deltas)
            for index, (factor, least) in known.items():
                changed[index] = int(max(least, factor * changed[index]) * chance.uniform(0.8, 1.2))
            rows.append((elapsed_ms, changed))
        attacks[family] = rows
    return benign, attacks


def drawn(model: Any, schema: Schema, chance: random.Random, count: int) -> Windows:
    """Windows as the model expects them: each feature about its centre, within a quarter of its deviation."""
    normal = Normalization(schema, model.metadata.normalization)
    rows: Windows = []
    for _ in range(count):
        deltas = []
        for kind, centre_q8, inv, shift in zip(schema.kinds, normal.centre_q8, normal.inv, normal.shift, strict=True):
            f_q8 = centre_q8 + chance.gauss(0, 4) * (1 << shift) / inv
            value = f_q8 if kind == SHARE else 2 ** (f_q8 / 256) - 1
            deltas.append(max(0, round(value)))
        rows.append((model.metadata.window_ms, deltas))
    return rows


def endless(windows: Windows, chance: random.Random) -> Iterator[tuple[int, list[int]]]:
    """The recording again and again, from a place of its own."""
    at = chance.randrange(len(windows))
    while True:
        yield windows[at]
        at = (at + 1) % len(windows)


def read_attack(text: str, attacks: dict[str, Windows]) -> tuple[str, float]:
    """ "mirai:5%" -> ("mirai", 0.05). Raises ConfigError."""
    name, _, share = text.partition(":")
    try:
        number = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1) if share else 0.05
    except ValueError:
        number = -1.0
    if not 0 < number <= 1:
        raise ConfigError(f"--attack {text}: write NAME:SHARE, for example mirai:5%")
    if name not in attacks:
        raise ConfigError(f"--attack {name}: there are {', '.join(sorted(attacks)) or 'none'}")
    return name, number


def learned_state(model: Any, schema: Schema, benign: Windows, chance: random.Random) -> dict[bytes, bytes]:
    """What an agent knows that has watched these windows for as long as the model learns, so that all begin so."""
    state = State(None)
    reporter = Delivery("sim", bytes(32), MemoryOutbox(), bytes_per_day=0, state=state)
    windows = endless(benign, chance)
    replay = Replay(schema, (next(windows) for _ in range(model.metadata.learn_windows + LEARNED_MARGIN)))
    agent = Agent(replay, model, reporter=reporter, state=state)
    for now_ms in replay:
        agent.end_window(now_ms)
    agent.save()
    return {name: bytes(value) for name, value in state.sections.items() if name not in (b"device", b"budget")}
