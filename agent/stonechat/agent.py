"""The agent's loop: the only room that knows the whole way from the counters to the broker.

agent = Agent(collector, model, client.publish, reporter=reporter, state=state)
while True:
    agent.tick()            # from any main loop; or: asyncio.create_task(agent.run())
    do_the_firmwares_work()
"""

from . import __version__
from .compat import const, ticks_add, ticks_diff, ticks_ms
from .detection import NORMAL, Verdict
from .errors import StonechatError
from .head import Head, fuse
from .report import CALIBRATE, WAS_NORMAL
from .window import Window

COMMANDS = (WAS_NORMAL, CALIBRATE)  # what the agent itself carries out; mute and the like the reporter does
PUMP_EVERY_MS = const(1000)  # how often the outbox is looked at between windows and messages
PUMP_AGAIN_MS = const(2000)  # the same while the broker can't be reached
SAVE_EVERY_WINDOWS = const(360)  # an hour at 10 s: bounds the wear of the flash


class Stage:
    """One collector and the head that scores it. The device's own counters are one, a vendor's are another."""

    def __init__(self, collector, model, state) -> None:
        self.collector = collector
        self.head = Head(model, collector.schema, state)
        self.window = Window(collector.schema, self.head.window_ms)
        self.values = [0] * len(collector.schema)
        self.peers_section = b"peers" + collector.schema.id
        if hasattr(collector, "restore"):
            peers = state.get(self.peers_section)
            if peers is not None:
                collector.restore(peers)
        # What no baseline may learn from: windows in which the collector itself still finds its feet.
        self.settle_windows = getattr(collector, "settle_windows", 0)

    def end_window(self, now_ms: int):
        """Read the counters at now_ms -> the Verdict, or None while priming, settling or for a dropped window."""
        self.collector.read(self.values)
        if not self.window.push(self.values, now_ms):
            return None
        if self.settle_windows:
            self.settle_windows -= 1
            return None
        return self.head.score(self.window.deltas, self.window.elapsed_ms)

    def hold_peers(self, hold: bool) -> None:
        """Under suspicion no peer becomes known."""
        if hasattr(self.collector, "hold_peers"):
            self.collector.hold_peers(hold)

    def save(self, state) -> None:
        self.head.save()
        if hasattr(self.collector, "dump"):
            state.put(self.peers_section, self.collector.dump())


class Agent:
    """collector, model: what is watched and what scores it, of one schema. publish(topic, payload, qos) hands a message
    to the broker and raises OSError or MQTTError when it can't; publish_retained is the same for the status, which the
    broker should keep. reporter: what is said; state: what is remembered; firmware: its id, a new one asks for a new
    calibration. extra: more (collector, model) pairs, a vendor's own counters, fused at the evidence.
    on_verdict(verdict, agent) is called after every scored window. Raises ModelError where a model is not for its
    collector's schema."""

    def __init__(
        self,
        collector,
        model,
        publish,
        *,
        reporter,
        state,
        firmware: str = "",
        publish_retained=None,
        extra=(),
        on_verdict=None,
    ) -> None:
        self.stages = [Stage(collector, model, state)]
        for more_collector, more_model in extra:
            self.stages.append(Stage(more_collector, more_model, state))
        self.reporter = reporter
        self.state = state
        self.publish = publish
        self.publish_retained = publish_retained or publish
        self.firmware = firmware
        reporter.supported = COMMANDS
        self.on_verdict = on_verdict
        self._fused = None if not extra else Verdict(sum([len(stage.values) for stage in self.stages]))
        self.window_ms = self.stages[0].head.window_ms
        self.windows = 0
        self.errors = 0
        self.last_error = ""
        self.offline = ""  # why the last try to publish failed; empty when it worked
        self._status_due = True
        release = firmware.encode()
        if state.get(b"firmware", release) != release:
            for stage in self.stages:
                stage.head.relearn()
        state.put(b"firmware", release)
        self._learning = self.learning
        self._due_ms = ticks_ms()
        self._pump_due_ms = self._due_ms

    @property
    def due_in_ms(self) -> int:
        """Milliseconds until tick() has something to do; never negative."""
        now_ms = ticks_ms()
        return max(0, min(ticks_diff(self._due_ms, now_ms), ticks_diff(self._pump_due_ms, now_ms)))

    def tick(self):
        """Do what is due and return at once otherwise -> the Verdict of a window that has just ended, else None.

        Never raises for what the device or the network does to it: StonechatError and OSError are counted in `errors`,
        the last one is told in `last_error`, and the next window is another try."""
        now_ms = ticks_ms()
        verdict = None
        if ticks_diff(now_ms, self._due_ms) >= 0:
            self._due_ms = ticks_add(self._due_ms, self.window_ms)
            if ticks_diff(now_ms, self._due_ms) >= 0:  # a whole window late: a suspend, a stalled loop
                self._due_ms = ticks_add(now_ms, self.window_ms)
            verdict = self.end_window(now_ms)
            self._pump_due_ms = now_ms
        if ticks_diff(now_ms, self._pump_due_ms) >= 0:
            self._pump(now_ms)
        return verdict

    def _pump(self, now_ms: int) -> None:
        try:
            if self._status_due:
                self.publish_retained(self.reporter.topics["status"], self.status(), 1)
                self._status_due = False
            self.reporter.pump(self.publish, now_ms)
            self.offline = ""
            self._pump_due_ms = ticks_add(now_ms, PUMP_EVERY_MS)
        except (StonechatError, OSError) as error:
            self.offline = _told(error)
            self._pump_due_ms = ticks_add(now_ms, PUMP_AGAIN_MS)

    async def run(self) -> None:
        """tick() for ever under asyncio; cancel the task to stop."""
        from asyncio import sleep

        while True:
            self.tick()
            await sleep(self.due_in_ms / 1000)

    def end_window(self, now_ms: int):
        """Close the window at now_ms (ticks), whatever the clock says -> the Verdict or None."""
        verdict = None
        try:
            verdicts = []
            for stage in self.stages:
                scored = stage.end_window(now_ms)
                if scored is not None:
                    verdicts.append(scored)
            if verdicts and len(verdicts) == len(self.stages):
                verdict = verdicts[0] if len(verdicts) == 1 else fuse(verdicts, self._fused)
                self.windows += 1
                self.reporter.observe(verdict, now_ms)
                for stage in self.stages:
                    stage.hold_peers(verdict.level != NORMAL)
                if self.on_verdict is not None:
                    self.on_verdict(verdict, self)
                learned = self._learning and not self.learning
                self._learning = self.learning
                if learned or self.windows % SAVE_EVERY_WINDOWS == 0:
                    self._status_due = True
                    self.save()
        except (StonechatError, OSError) as error:
            self._failed(error)
        return verdict

    @property
    def learning(self) -> bool:
        """True while a head still learns what is normal on this device."""
        return any([stage.head.learning for stage in self.stages])

    def status(self) -> bytes:
        """The sealed status: what rarely changes (firmware, model, schema, sources, what was learned)."""
        head = self.stages[0].head
        collector = self.stages[0].collector
        return self.reporter.status(
            firmware=self.firmware,
            model=head.model.digest,
            schema=collector.schema.id,
            window_ms=self.window_ms,
            sources=[group + " " + source for group, source, _ in collector.sources],
            adaptation_q8=head.facts()[0] << 4,
            learning=self.learning,
            agent=__version__,
        )

    def connected(self) -> None:
        """Tell the agent that a connection to the broker stands (on_connect): it sends its status and what waits."""
        self.reporter.reconnected()
        self._status_due = True
        self._pump_due_ms = ticks_ms()

    def on_message(self, topic, payload: bytes) -> None:
        """Take a message from the broker: acknowledgements and commands that authenticate are carried out."""
        self._pump_due_ms = ticks_ms()  # an acknowledgement makes room for what waits
        try:
            for code, _ in self.reporter.on_message(topic, payload):
                if code == CALIBRATE:
                    self.relearn()
                elif code == WAS_NORMAL:
                    for stage in self.stages:
                        stage.head.forgive()
        except (StonechatError, OSError) as error:
            self._failed(error)

    def relearn(self) -> None:
        """Forget the calibration of every head and learn it again, as after a new firmware."""
        for stage in self.stages:
            stage.head.relearn()
        self._learning = True
        self._status_due = True

    def save(self) -> None:
        """Write down what was learned. Raises StateError where the medium refuses."""
        for stage in self.stages:
            stage.save(self.state)
        self.state.save()
        self.reporter.outbox.save()

    def close(self) -> None:
        """Save and let go of the collectors; errors are counted, not raised."""
        try:
            self.save()
        except (StonechatError, OSError) as error:
            self._failed(error)
        for stage in self.stages:
            stage.collector.close()

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        self.last_error = _told(error)


def _told(error: Exception) -> str:
    return "%s: %s" % (type(error).__name__, error)
