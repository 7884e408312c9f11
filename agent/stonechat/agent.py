"""The agent: the loop of loop.py with several channels, and with what the collector sends back.

agent = Agent(collector, model, client.publish, reporter=Delivery(...), state=state)
while True:
    agent.tick()            # from any main loop; or: asyncio.create_task(agent.run())
    do_the_firmwares_work()
"""

from .compat import ticks_ms
from .delivery import CALIBRATE, WAS_NORMAL
from .detection import Verdict
from .errors import StonechatError
from .loop import Channel, Loop


class Agent(Loop):
    """collector, model: what is watched and what scores it, of one schema. extra: more (collector, model) pairs, a
    vendor's own counters, fused at the evidence. on_verdict(verdict, agent) is called after every scored window.
    reporter: a Delivery. The rest is as in Loop. Raises ModelError where a model is not for its collector's schema."""

    def __init__(self, collector, model, publish, *, reporter, state, extra=(), on_verdict=None, **options) -> None:
        channels = [Channel(collector, model, state)]
        for more_collector, more_model in extra:
            channels.append(Channel(more_collector, more_model, state))
        self._fused = None
        if extra:
            from .custom_counters import fuse  # a board has it only where it was built --with counters

            self._fuse = fuse
            self._fused = Verdict(sum([len(channel.values) for channel in channels]))
        reporter.supported = (WAS_NORMAL, CALIBRATE)  # what is carried out here; mute and the like the reporter does
        self.on_verdict = on_verdict
        Loop.__init__(self, channels, publish, reporter, state, **options)

    async def run(self) -> None:
        """tick() for ever under asyncio; cancel the task to stop."""
        from asyncio import sleep

        while True:
            self.tick()
            await sleep(self.due_in_ms / 1000)

    def end_window(self, now_ms: int):
        verdict = Loop.end_window(self, now_ms)
        if verdict is not None and self.on_verdict is not None:
            self.on_verdict(verdict, self)
        return verdict

    def _score(self, now_ms: int):
        if not self._fused:
            return Loop._score(self, now_ms)
        verdicts = [self.channels[0].end_window(now_ms)]
        for channel in self.channels[1:]:
            try:
                verdict = channel.end_window(now_ms)
            except (StonechatError, OSError) as error:  # the device's own channel goes on without it
                self._failed(error)
                channel.window.primed = False
                verdict = None
            verdicts.append(verdict or _blank(len(channel.values)))
        return self._fuse(verdicts, self._fused) if verdicts[0] else None

    @property
    def lacks(self) -> str:
        """What the collectors can't read at present, "" where nothing is missing."""
        return "; ".join(
            [channel.collector.lacks for channel in self.channels if getattr(channel.collector, "lacks", "")]
        )

    def announce(self) -> None:
        """Send the status again: something in it has changed."""
        self._status_due = True
        self._pump_due_ms = ticks_ms()

    def on_message(self, topic, payload: bytes) -> None:
        """Take a message from the broker: acknowledgements and commands that authenticate are carried out."""
        self._pump_due_ms = ticks_ms()  # an acknowledgement frees space for what waits
        try:
            for code, _ in self.reporter.on_message(topic, payload):
                if code == CALIBRATE:
                    self.recalibrate()
                elif code == WAS_NORMAL:
                    for channel in self.channels:
                        channel.scorer.clear_evidence()
        except (StonechatError, OSError) as error:
            self._failed(error)

    def close(self) -> None:
        """Save and let go of the collectors; errors are counted, not raised."""
        try:
            self.save()
        except (StonechatError, OSError) as error:
            self._failed(error)
        for channel in self.channels:
            channel.collector.close()


def _blank(size):
    """The verdict of a channel that has none: it decides nothing."""
    verdict = Verdict(size)
    verdict.learning = True
    return verdict
