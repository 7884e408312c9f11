"""One collector window by window, as `stonechat top` shows it: features, z and the verdict."""

import statistics
import time
from typing import Any

from stonechat.compat import ticks_ms
from stonechat.detection import NORMAL
from stonechat.features import LEVEL, RATE, SHARE, Normalization
from stonechat.fusion import FusedVerdict, fuse
from stonechat.linux.sent_to_peers import SentToPeers
from stonechat.model_file import pack_normalization
from stonechat.schema import Schema
from stonechat.scorer import Scorer
from stonechat.state import State
from stonechat.steady import SteadyChannel
from stonechat.window import Window

LEARN_WINDOWS = 30  # of the display's own learning
FIRST_LOOK_WINDOWS = 5  # it shows z from here on
_FLOOR_Q8 = {RATE: 64, LEVEL: 64, SHARE: 256}  # a quarter of a doubling; one percent
LEVELS = ("normal", "watch", "alarm")


class Usual:
    """What is usual without a model: median and spread of each feature over the first windows."""

    def __init__(self, schema: Schema) -> None:
        self._kinds = [kind for _, _, kind in schema.columns]
        self._rows: list[list[int]] = []
        self._centre: list[float] = []
        self._scale: list[float] = []

    @property
    def windows(self) -> int:
        return len(self._rows)

    def z(self, f_q8: list[int]) -> list[float | None]:
        """Learn from f_q8 while there are windows to learn from -> the distance of each in deviations."""
        if len(self._rows) < LEARN_WINDOWS:
            self._rows.append(list(f_q8))
            if len(self._rows) >= FIRST_LOOK_WINDOWS:
                self._fit_location_scale()
        if not self._scale:
            return [None] * len(f_q8)
        return [(f - centre) / scale for f, centre, scale in zip(f_q8, self._centre, self._scale, strict=True)]

    def _fit_location_scale(self) -> None:
        columns = list(zip(*self._rows, strict=True))
        self._centre = [statistics.median(column) for column in columns]
        self._scale = []
        for kind, column, centre in zip(self._kinds, columns, self._centre, strict=True):
            spread = 1.48 * statistics.median(abs(value - centre) for value in column)
            self._scale.append(max(spread, statistics.pstdev(column) / 2, _FLOOR_Q8[kind]))


class View:
    """A collector and what scores it: with a model the agent's own loop.Channel, so that the verdicts are the agent's.
    peer_windows: what is sent to each host is judged as well, learned in N windows; 0: without that, as without BPF.
    `step()` waits for nothing: call it when a window has ended."""

    def __init__(
        self, collector: Any, model: Any, state: State | None, interval_s: float, peer_windows: int = 0
    ) -> None:
        self.collector = collector
        self.schema: Schema = collector.schema
        self.channel = SteadyChannel(collector, model, state or State()) if model else None
        self.scorer: Scorer | None = self.channel.scorer if self.channel else None
        self.model_name = self.scorer.meta.name if self.scorer else None
        self.window_ms: int = self.scorer.window_ms if self.scorer else round(1000 * interval_s)
        self.windows = 0
        self.shown: dict[str, Any] | None = None
        self._window = self.channel.window if self.channel else Window(self.schema, self.window_ms)
        self._sent: SentToPeers | None = None
        if self.channel and peer_windows and collector.sent is not None:
            self._sent = SentToPeers(collector, self.window_ms, peer_windows).open(None)
        self._fused = FusedVerdict(0)
        self._values = [0] * len(self.schema)
        plain = pack_normalization([0] * len(self.schema), [256] * len(self.schema))
        self._features = Normalization(self.schema, plain)
        self._usual = Usual(self.schema)

    def step(self) -> dict[str, Any] | None:
        """Read the counters -> the window that they end, as --json prints it; None while priming or for a dropped
        one. Raises CollectorError or OSError."""
        z: list[float | None]
        shares: list[int] | None = None
        verdict: dict[str, Any] | None = None
        if self.channel:
            warming_up = self.channel.warmup_windows
            scored = self.channel.end_window(ticks_ms())
            of_hosts = self._sent.end_window(ticks_ms()) if self._sent else None
            if scored is not None:
                fused = fuse([scored, of_hosts], self._fused)
                for channel in (self.channel, self._sent) if self._sent else (self.channel,):
                    channel.hold_peers(fused.level != NORMAL)  # as the loop does
                z, shares, verdict = self._verdict_of(scored, fused)
            elif self.channel.warmup_windows < warming_up:
                z = self._inputs(self.channel.scorer)
            else:
                return None
        else:
            self.collector.read(self._values)
            if not self._window.push(self._values, ticks_ms()):
                return None
            z = self._without()
        self.windows += 1
        deltas, elapsed_ms = self._window.deltas, self._window.elapsed_ms
        features = {}
        for i, (name, unit, kind) in enumerate(self.schema.columns):
            features[name] = {"value": _reading(kind, deltas[i], elapsed_ms), "unit": unit, "z": z[i]}
            if shares:
                features[name]["share_percent"] = shares[i]
        self.shown = {
            "time_s": round(time.time(), 1),
            "schema": self.schema.name,
            "model": self.model_name,
            "elapsed_ms": elapsed_ms,
            "dropped": self._window.dropped,
            "deltas": list(deltas),
            "verdict": verdict,
            "features": features,
        }
        return self.shown

    def recalibrate(self) -> None:
        self._usual = Usual(self.schema)
        for scorer in (self.scorer, self._sent):
            if scorer:
                scorer.recalibrate()

    def learning(self) -> str:
        """What is still to be learned, in words; empty when nothing is."""
        if self.channel and self.channel.warmup_windows:
            return f"learning the peers, {self.channel.warmup_windows} windows left"
        if self.scorer:
            percent = 100 * self.scorer.seen // max(1, self.scorer.meta.learn_windows)
            return f"learning, {percent} %" if self.scorer.learning else ""
        left = LEARN_WINDOWS - self._usual.windows
        return f"learning what is usual, {left} windows left" if left else ""

    def _verdict_of(self, verdict: Any, fused: Any) -> tuple[list[float | None], list[int], dict[str, Any]]:
        """The channel's verdict, and what it and that of the hosts come to -> deviations and shares of the features,
        and the verdict for --json, whose surprise is the channel's."""
        total = sum(verdict.parts) or 1
        names = [name for name, _, _ in (SentToPeers if fused.channel else self).schema.columns]
        shown = {
            "level": LEVELS[fused.level],
            "learning": fused.learning,
            "steady": fused.steady,
            "surprise": round(verdict.surprise_q8 / 256, 2),
            "evidence": round(fused.evidence_q8 / 256, 3),
            "explain": [
                {"feature": names[i], "z": z_q4 / 16, "share_percent": share} for i, z_q4, share in fused.explain(3)
            ],
        }
        return _deviations(verdict.x), [round(100 * part / total) for part in verdict.parts], shown

    def _inputs(self, scorer: Scorer) -> list[float | None]:
        f_q8, x = [0] * len(self.schema), bytearray(len(self.schema))
        scorer.normalization.fill_q8(self._window.deltas, self._window.elapsed_ms, self.window_ms, f_q8)
        scorer.normalization.fill(f_q8, x)
        return _deviations(x)

    def _without(self) -> list[float | None]:
        f_q8 = [0] * len(self.schema)
        self._features.fill_q8(self._window.deltas, self._window.elapsed_ms, self.window_ms, f_q8)
        return [z if z is None else round(z, 2) for z in self._usual.z(f_q8)]


def _deviations(x: bytearray) -> list[float | None]:
    return [(byte - 256 if byte > 127 else byte) / 16 for byte in x]


def _reading(kind: str, delta: int, elapsed_ms: int) -> float:
    if kind == RATE:
        return round(1000 * delta / elapsed_ms, 2)
    return round(delta / 256, 2) if kind == SHARE else delta
