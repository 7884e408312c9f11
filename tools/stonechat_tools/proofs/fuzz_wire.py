"""Throws forged, cut, replayed, foreign, oversized and nested messages at both ends of the wire.

Each message goes through the collector's own path (its database included) or, where it is for a device, through a
Delivery. Nothing may raise, nothing may be stored or carried out that is not authentic and new, memory may not grow.
"""

import gc
import random
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import cbor2
from stonechat.commands import CALIBRATE
from stonechat.delivery import Delivery
from stonechat.outbox_memory import MemoryOutbox

from ..fleet import keyring, wire
from ..fleet.collector import Collector
from ..fleet.mqtt_codec import Message
from ..fleet.store import CONFLICT, DUPLICATE, STORED, Store

MESSAGES = 1_000_000
DEVICES = 4
BATCH = 200
GROWTH_BYTES = 128 * 1024


class Verdict:
    score_q8 = 700
    surprise_q8 = 300
    evidence_q8 = 900
    changed = False
    learning = False
    unfit = False

    def __init__(self, level: int) -> None:
        self.level = level

    def explain(self, k: int) -> list[tuple[int, int, int]]:
        return [(1, 20, 60), (2, -20, 30), (3, 5, 10)][:k]


class Fuzzer:
    """A fleet whose messages are known, and a stream of what an attacker makes of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.secrets = {f"dev-{i}": bytes([i]) * 32 for i in range(DEVICES)}
        self.keys = {name: keyring.DeviceKeys(secret, name) for name, secret in self.secrets.items()}
        self.genuine: list[tuple[str, str, bytes]] = []
        for name, secret in self.secrets.items():
            reporter = Delivery(name, secret, MemoryOutbox(), heartbeat_windows=1, bytes_per_day=0, resend_ms=1 << 29)
            take = self._taker(name)
            for i in range(8):
                reporter.observe(Verdict(i % 3), 10_000 * i)
                reporter.pump(take, 10_000 * i)
            self.genuine.append((name, "status", bytes(reporter.status(firmware="1.0"))))
            self.genuine.append((name, "status", bytes(reporter.status(online=False))))
        now_s = int(time.time())
        for name, keys in self.keys.items():
            self.genuine.append((name, "ack", wire.seal_ack(keys, bytes(4), [(1, 2)])))
            self.genuine.append((name, "command", wire.seal_command(keys, now_s, now_s + 600, CALIBRATE)))

    def _taker(self, name: str) -> Any:
        return lambda topic, payload, qos, retain: self.genuine.append((name, "report", bytes(payload)))

    def next(self) -> tuple[str, str, bytes]:
        """One hostile message: (device, topic's last level, payload)."""
        rng = self.random
        name, kind, message = rng.choice(self.genuine)
        attack = rng.randrange(12)
        if attack == 0:  # bits flipped
            forged = bytearray(message)
            for _ in range(rng.randint(1, 4)):
                forged[rng.randrange(len(forged))] ^= 1 << rng.randrange(8)
            return name, kind, bytes(forged) if bytes(forged) != message else b""
        if attack == 1:
            return name, kind, message[: rng.randrange(len(message))]
        if attack == 2:
            return name, kind, message + rng.randbytes(rng.randint(1, 40))
        if attack == 3:  # replayed, or reordered
            return name, kind, message
        if attack == 4:  # moved to another device
            return rng.choice([other for other in self.keys if other != name]), kind, message
        if attack == 5:  # moved to another topic
            return name, rng.choice([k for k in ("report", "status", "ack", "command") if k != kind]), message
        if attack == 6:
            return name, kind, rng.randbytes(rng.randint(0, 200))
        if attack == 7:  # nested deeply
            depth = rng.randint(9, 400)
            return name, kind, rng.choice((b"\x81", b"\xa1\x00", b"\xd1", b"\x9f", b"\xd8\x18")) * depth
        if attack == 8:  # large; a megabyte once in a while
            return name, kind, bytes(1_000_000) if rng.randrange(200) == 0 else bytes(rng.randint(513, 4000))
        if attack == 9:  # a device's own key under nonsense or under another version
            return name, kind, self._sign(name, kind, self._nonsense())
        if attack == 10:
            return rng.choice(("dev-9", "", "+", "#", "../dev-1", "dev-1/x", "\u00e9", "x" * 300)), kind, message
        lengths = (b"\x5b", b"\x9b", b"\xbb")  # lengths that would take all memory
        return name, kind, b"\x84\x43\xa1\x01\x04\xa0" + rng.choice(lengths) + rng.randbytes(8) + rng.randbytes(30)

    def _sign(self, name: str, kind: str, payload: bytes) -> bytes:
        return getattr(self.keys[name], kind).seal(payload)  # type: ignore[no-any-return]

    def _nonsense(self) -> bytes:
        rng = self.random
        choice = rng.randrange(4)
        if choice == 0:
            return rng.randbytes(rng.randint(1, 60))
        if choice == 1:
            return rng.choice((b"\x81", b"\xa1\x00")) * rng.randint(9, 200) + b"\x00"
        fields: dict[Any, Any] = {0: rng.choice((0, 2, 3, None, "1", -1))}
        for key in rng.sample(range(1, 20), rng.randint(0, 8)):
            fields[key] = rng.choice((-1, 1 << 40, None, True, b"x" * 9, "text", [1], {}, 1.5, rng.randrange(70_000)))
        if choice == 3:
            fields[0] = 1
            fields[5] = "not a level"  # so that it never is a whole report, status, or command
            fields[1] = rng.choice((-1, "x", None, [-1], [1]))
        return bytes(cbor2.dumps(fields))


class _Client:
    """In place of the connection: counts the acknowledgements."""

    def __init__(self) -> None:
        self.acks = 0

    def send(self, mids: Sequence[int], publishes: Sequence[tuple[str, bytes]], epoch: int | None = None) -> None:
        self.acks += len(mids)


def soak(scale: float) -> bool:
    """MESSAGES * scale messages; prints what became of them."""
    total = max(BATCH * 5, int(MESSAGES * scale))
    fuzzer = Fuzzer(1)
    store = Store(":memory:")
    collector = Collector(store, keyring.Keys(fuzzer.secrets))
    client = _Client()
    collector._clients = [client]
    reporters = {name: Delivery(name, secret, MemoryOutbox()) for name, secret in fuzzer.secrets.items()}
    actions: list[list[int]] = []  # the arguments of the commands that the message in hand made a device carry out
    for reporter in reporters.values():
        reporter.commands.actions[CALIBRATE] = actions.append
    genuine = {message: (name, kind) for name, kind, message in fuzzer.genuine}
    up = [
        Message(f"{collector.prefix}{name}/{kind}", message, 0, 1)
        for name, kind, message in fuzzer.genuine
        if kind in ("report", "status")
    ]
    collector.take(up)
    wanted = sum(kind == "report" for _, kind, _ in fuzzer.genuine)
    wrong: list[str] = []
    carried_out = 0
    before = 0
    began_s = time.monotonic()
    done = 0
    while done < total:
        if done >= total // 4 and not tracemalloc.is_tracing():
            tracemalloc.start()
        if done >= total // 2 and not before:
            before = _memory()
        batch = []
        for _ in range(BATCH):
            name, kind, payload = fuzzer.next()
            done += 1
            receiver = reporters.get(name)
            if kind in ("ack", "command"):
                if receiver is not None:
                    receiver.on_message(receiver.topic + kind, payload)
                    if actions and genuine.get(payload) != (name, "command"):
                        wrong.append(f"carried out {actions} for {name}")
                    carried_out += len(actions)
                    actions.clear()
            else:
                batch.append(Message(f"{collector.prefix}{name}/{kind}", payload, 0, 1))
        collector.take(batch)
    grown = _memory() - before
    tracemalloc.stop()
    counts = collector.counts
    stored = store.count()
    rejected = sum(counts[reason] for reason in keyring.REASONS)
    refused = sum(reporter.rejected for reporter in reporters.values())
    print(f"{total} messages in {time.monotonic() - began_s:.0f} s; at the collector {client.acks} acknowledged:")
    print("  " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    print(f"  at the devices {refused} refused, {carried_out} commands carried out (each once: {DEVICES} genuine)")
    print(f"  memory over the second half {grown / 1024:+.0f} KiB")
    if stored != wanted or counts[STORED] != wanted:
        wrong.append(f"{stored} reports stored, {wanted} are genuine")
    if counts[CONFLICT] or carried_out > DEVICES:
        wrong.append(f"{counts[CONFLICT]} conflicts, {carried_out} commands")
    if client.acks != rejected + counts[STORED] + counts[DUPLICATE] + counts["status"]:
        wrong.append("a message was neither stored nor counted")
    if grown > GROWTH_BYTES:
        wrong.append(f"memory grew by {grown} bytes")
    for line in wrong[:5]:
        print("  WRONG: " + line)
    store.close()
    return not wrong


def _memory() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]
