"""Start-up shared by both board profiles. Returns a Watch, the object that the firmware ticks."""

from ..compat import const, ticks_diff, ticks_ms, tidy
from ..mqtt import Client
from . import hooks

_MAX_PACKET = const(328)  # an acknowledgement of sixteen ranges and its stream, with the topic


class Watch:
    """What start() gives. agent: the loop; transport: the own MQTT client or None; counter: the hook's; errors,
    last_error: what tick() and save() kept from the firmware. The loop has its own (loop.Loop)."""

    def __init__(self, agent, transport, counter, feed=None):
        self.agent = agent
        self._turn = agent.tick  # a method taken from its object anew would allocate
        self.transport = transport
        if transport:
            self._poll = transport.poll
        self.counter = counter
        self.feed = feed
        self.errors = 0
        self.last_error = ""

    def tick(self, _=None):
        """One turn -> the Verdict of a window that has just ended, else None. (The argument is a Timer's.)"""
        now_ms = ticks_ms()
        verdict = None
        self.counter.beat(now_ms)
        if self.transport:
            self._quietly(self._poll)
        agent = self.agent
        if ticks_diff(now_ms, agent.due_ms) >= 0 or ticks_diff(now_ms, agent.pump_due_ms) >= 0:
            verdict = self._quietly(self._turn)
        if self.feed:
            self.feed()
        return verdict

    def _quietly(self, call):
        """call() while nothing is counted that this thread does: what the agent itself does is not the firmware's.
        Where the agent is at work already (a Timer's tick in the middle of save()), nothing is done."""
        if self.counter.quiet is not None:
            return None
        self.counter.quiet = hooks.get_ident()
        try:
            return call()
        except Exception as error:  # the one place that catches everything: the firmware must go on
            self.errors += 1
            try:
                self.last_error = repr(error)
            except MemoryError:  # the firmware has taken all there is; it must go on all the same
                pass
        finally:
            self.counter.quiet = None

    async def run(self):
        """tick() for ever under asyncio; cancel the task to stop."""
        from asyncio import sleep

        while True:
            self.tick()
            await sleep(0.1)

    def save(self):
        """Write down what was learned: before a reset or a deep sleep. Counts what goes wrong like tick()."""
        self._quietly(self.agent.save)


def begin(make, device_id, key, host, port, user, password, tls, keepalive_s, feed):
    """make(collector): puts the profile's agent together; the rest as start() takes it -> Watch."""
    counter = hooks.install()
    counter.quiet = hooks.get_ident()
    try:
        counter.secret = key
        tidy()  # what lives long should lie together: a small heap has few long gaps
        agent = make(counter)
        transport = None
        if host is not None:
            reporter = agent.reporter
            transport = Client(
                device_id,
                host,
                port,
                user=user,
                password=password,
                tls=tls,
                keepalive_s=keepalive_s,
                socket=hooks.real_socket,
                # without subscriptions, the topic of what the broker may still hold for this device's full profile
                max_packet=_MAX_PACKET if reporter.subscriptions else len(reporter.topic) + 32,
            )
            agent.connect(transport)
    finally:
        counter.quiet = None
    tidy()
    return Watch(agent, transport, counter, feed)
