"""The loop from the counters to the broker: a Channel is one collector with its scorer, Loop does what is due.

A board's core profile uses both directly; agent.py adds more channels, and what the collector sends back.
"""

from . import __version__
from .compat import const, ticks_add, ticks_diff, ticks_ms
from .errors import StonechatError
from .scorer import Scorer
from .window import Window

_PUMP_EVERY_MS = const(1000)  # how often the reporter is asked between windows and messages
_PUMP_AGAIN_MS = const(2000)  # the same while the broker can't be reached
_SAVE_EVERY_WINDOWS = const(360)  # an hour at 10 s: bounds the wear of the flash

# Why a window was not scored: indexes of Loop.unscored
_DROPPED = const(0)  # too long: a suspend, a stalled loop
_PRIMING = const(1)  # the first reading, or the collector's warm-up
_UNREAD = const(2)  # the collector failed
_OTHERWISE = const(3)  # anything after that


class Channel:
    """One collector with its scorer. The device's own counters are one channel, a vendor's custom counters another.
    Raises ModelError where the model is not for the collector's schema."""

    _scorer_type = Scorer

    def __init__(self, collector, model, state) -> None:
        self.collector = collector
        self.scorer = self._scorer_type(model, collector.schema, state)
        self.window = Window(collector.schema, self.scorer.window_ms)
        self.values = [0] * len(collector.schema)
        self._section = b"peers" + collector.schema.id
        self._has_peers = hasattr(collector, "dump")
        if self._has_peers and state.get(self._section) is not None:
            collector.restore(state.get(self._section))
        # Warm-up: windows that no baseline may learn from, while the collector learns its peers.
        self.warmup_windows = getattr(collector, "warmup_windows", 0)
        self.cause = 0  # where end_window() came to, an index of Loop.unscored

    def end_window(self, now_ms: int):
        """Read the counters at now_ms -> the Verdict, or None while priming, warming up or for a dropped window."""
        window = self.window
        self.cause = _UNREAD
        self.collector.read(self.values)
        self.cause = _DROPPED if window.primed else _PRIMING
        if not window.push(self.values, now_ms):
            return None
        self.cause = _PRIMING
        if self.warmup_windows:
            self.warmup_windows -= 1
            return None
        self.cause = _OTHERWISE
        return self.scorer.score(self.window.deltas, self.window.elapsed_ms)

    def hold_peers(self, hold: bool) -> None:
        """Under suspicion no peer becomes known."""
        if self._has_peers:
            self.collector.hold_peers(hold)

    def save(self, state) -> None:
        self.scorer.save()
        if self._has_peers:
            state.put(self._section, self.collector.dump())


class Loop:
    """channels: of which the first is the device's own; reporter: makes the reports; state: keeps what was learned;
    publish: how messages reach the broker, where no client is connected (see connect); firmware: its id, a new one
    starts a calibration. `unscored` counts the windows that were not scored since the start, by cause: dropped because
    the loop was late or suspended, priming or warming up, not read, failed otherwise."""

    _status_due: bool
    pump_due_ms: int

    def __init__(self, channels, reporter, state, *, publish=None, firmware: str = "") -> None:
        self.channels = channels
        self.reporter = reporter
        self.state = state
        self.publish = publish
        self.firmware = firmware
        self.window_ms = channels[0].scorer.window_ms
        self.windows = 0
        self.unscored = [0, 0, 0, 0]
        self._quiet_until = 0
        self.errors = 0
        self.last_error = ""
        self.offline = ""  # why the last try to publish failed; empty when it worked
        release = firmware.encode()
        if state.get(b"firmware", release) != release:
            self.recalibrate()
        state.put(b"firmware", release)
        self._learning = self.learning
        self.due_ms = ticks_ms()
        self.connected()

    def tick(self):
        """Do what is due and return at once otherwise -> the Verdict of a window that has just ended, else None.

        Never raises for what the device or the network does to it: StonechatError and OSError are counted in `errors`,
        the last one is in `last_error`, and the next window is another attempt."""
        now_ms = ticks_ms()
        verdict = None
        if ticks_diff(now_ms, self.due_ms) >= 0:
            self.due_ms = ticks_add(self.due_ms, self.window_ms)
            late_ms = ticks_diff(now_ms, self.due_ms)
            if late_ms >= 0:  # a whole window late: a suspend, a stalled loop
                self.unscored[_DROPPED] += 1 + late_ms // self.window_ms
                self.due_ms = ticks_add(now_ms, self.window_ms)
            verdict = self.end_window(now_ms)
            self.pump_due_ms = now_ms
        if ticks_diff(now_ms, self.pump_due_ms) >= 0:
            wait_ms = _PUMP_EVERY_MS
            self.offline = ""
            try:
                if self._status_due:
                    self._status_due = not self.reporter.send_status(self.publish, self.status)
                self.reporter.pump(self.publish, now_ms)
            except (StonechatError, OSError) as error:
                self.offline = repr(error)
                wait_ms = _PUMP_AGAIN_MS
            self.pump_due_ms = ticks_add(now_ms, wait_ms)
        return verdict

    def end_window(self, now_ms: int):
        """Close the window at now_ms (ticks), whatever the clock says -> the Verdict or None."""
        verdict = None
        try:
            verdict = self._score(now_ms)
            if verdict:
                self.windows += 1
                self.reporter.observe(verdict, now_ms)
                for channel in self.channels:
                    channel.hold_peers(verdict.level > 0)
                if self.learning != self._learning:
                    self._learning = not self._learning
                    self._status_due = True
                    self.save()
                elif self.windows % _SAVE_EVERY_WINDOWS == 0:
                    self.save()
        except (StonechatError, OSError) as error:
            self._failed(error)
        if not verdict:
            cause = self.channels[0].cause
            self.unscored[cause] += 1
            if cause != _PRIMING and self.windows >= self._quiet_until:  # the status has these counts
                self._quiet_until = self.windows + 30
                self._status_due = True
        return verdict

    def _score(self, now_ms: int):
        return self.channels[0].end_window(now_ms)

    @property
    def learning(self) -> bool:
        """True while a scorer still learns what is normal on this device."""
        for channel in self.channels:  # noqa: SIM110 - a generator would allocate
            if channel.scorer.learning:
                return True
        return False

    def status(self) -> bytearray:
        """The sealed status: what rarely changes (firmware, model, schema, sources, what was learned)."""
        channel = self.channels[0]
        return self.reporter.status(
            firmware=self.firmware,
            model=channel.scorer.model.digest,
            schema=channel.collector.schema.id,
            window_ms=self.window_ms,
            sources=[row[0] + " " + row[1] for each in self.channels for row in each.collector.sources],
            adaptation_q8=channel.scorer.adaptation.distance() << 4,
            learning=self.learning,
            agent=__version__,
            unscored=self.unscored,
        )

    def connect(self, client):
        """Let `client` carry everything: last will, status and reports; to be called before it connects. client:
        mqtt.Client or another Transport (protocols.pyi) -> the client."""
        client.will = (self.reporter.status_topic, self.reporter.status(online=False), 1, True)
        client.on_connect = self.connected
        self.publish = client.publish
        return client

    def connected(self) -> None:
        """To be called when a connection to the broker is made (on_connect): sends the status and what waits."""
        self.reporter.reconnected()
        self._status_due = True
        self.pump_due_ms = ticks_ms()

    def recalibrate(self) -> None:
        """Forget the calibration of every scorer and learn it again, as after a new firmware."""
        for channel in self.channels:
            channel.scorer.recalibrate()
        self._status_due = True

    def save(self) -> None:
        """Write down what was learned. Raises StateError where the medium refuses."""
        for channel in self.channels:
            channel.save(self.state)
        self.reporter.save(self.state)
        self.state.save()

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        self.last_error = repr(error)
